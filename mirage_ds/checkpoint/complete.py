"""Complete checkpoints: their files with size and sha256, their final name, how many are kept.

FOLDER/global_step20.part/    being written, or left by a killed run; never loaded
FOLDER/global_step20/         the final name, given once all files are on disk; files.json lists them
FOLDER/latest                 the tag of the last one, for DeepSpeed's own tools; mirage_ds does not read it
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirage_ds.housekeeping import housekeeping

FOLDER = "checkpoints"  # in a run's folder
FILES_NAME = "files.json"
PART = ".part"


def describe_file(file: Path) -> dict[str, Any]:
    """The entry of a file in files.json."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def read_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Reads files.json of a checkpoint.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    files = json.loads((checkpoint / FILES_NAME).read_text())
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    if not all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values()):
        raise ValueError("an entry has no bytes or no sha256")
    return files


def wrong_size(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete, by file names and sizes; None if it is complete."""
    try:
        files = read_files(checkpoint)
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has size {size}, expected {expected['bytes']} bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{FILES_NAME} or a file that it lists cannot be read: {error}"
    return None


def wrong_content(checkpoint: Path, part: slice = slice(None)) -> str | None:
    """The first file whose sha256 differs from the one in files.json; None if there is none.

    Args:
        part: which of the files, sorted by name, are read; each rank reads its share.
    """
    try:
        for name, expected in sorted(read_files(checkpoint).items())[part]:
            if describe_file(checkpoint / name) != expected:
                return f"the sha256 of {name} differs from the one in {FILES_NAME}"
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {error}"
    return None


def step_of(path: Path) -> int | None:
    """20 for global_step20; None if it is not a checkpoint or is still being written."""
    number = path.name.removeprefix("global_step")
    return int(number) if path.name.startswith("global_step") and number.isdecimal() else None


def tags(folder: Path) -> list[Path]:
    """All checkpoints in a folder by their names, complete or not, newest first."""
    steps = {path: step for path in folder.glob("global_step*") if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def publish(part: Path) -> Path:
    """Renames a .part folder to its final name, replacing a folder of that name; durable after a power failure.

    Raises:
        OSError: a file that files.json lists is missing or of another size, or the system refused.
    """
    wrong = wrong_size(part)
    if wrong:
        raise OSError(wrong)
    for path in (*part.iterdir(), part):
        sync(path)
    final = part.with_name(part.name.removesuffix(PART))
    aside = final.with_name(f"{final.name}.{time.time_ns()}{PART}")
    if os.path.lexists(final):  # of the same step and damaged: the run resumed from an earlier one
        final.rename(aside)  # a folder can be renamed even if it cannot be deleted
    part.rename(final)
    sync(final.parent)
    if os.path.lexists(aside):
        discard(aside)
    return final


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint that is no longer needed. One that its user protected stays, with a warning.

    Of one that its user moved and left a link for, only the link is deleted.
    """
    with housekeeping(f"a checkpoint was not deleted ({checkpoint})", "delete it by hand, if you do not need it"):
        if checkpoint.is_symlink():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint)


def remove_parts(folder: Path) -> None:
    """Deletes unfinished checkpoints of earlier attempts; `folder` must belong to one run."""
    for path in folder.glob(f"global_step*{PART}"):
        discard(path)


def parts_bytes(folder: Path) -> int:
    """Bytes that `remove_parts` would free."""
    return sum(file.stat().st_size for file in folder.glob(f"global_step*{PART}/*"))


def prune(folder: Path, step: int, keep_latest_k: int) -> None:
    """Deletes checkpoints that are older than the last `keep_latest_k` complete ones of steps up to `step`.

    Incomplete checkpoints do not count, and are deleted if they are older. Those after `step` were skipped as damaged
    when the run resumed, and are kept. A folder that cannot be read stays as it is, with a warning.
    """
    with housekeeping(f"old checkpoints were not deleted ({folder})", "the next save tries it again"):
        earlier = [path for path in tags(folder) if (step_of(path) or 0) <= step]
        kept = [path for path in earlier if wrong_size(path) is None][:keep_latest_k]
        if len(kept) == keep_latest_k:
            for old in earlier[earlier.index(kept[-1]) + 1 :]:
                discard(old)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def total_bytes(files: Iterable[dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files)
