"""Which checkpoints are complete: their files with size and sha256, the name that says so, how many are kept.

FOLDER/global_step20.part/    being written, or what a killed run left of it; never loaded
FOLDER/global_step20/         renamed at once when all of it was on the disk; files.json names its files
FOLDER/latest                 the tag of the last one, for DeepSpeed's own tools; nothing here reads it
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"  # in a run's folder
FILES_NAME = "files.json"
PART = ".part"


def describe_file(file: Path) -> dict[str, Any]:
    """Its entry in files.json."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def check_written(file: Path) -> dict[str, Any]:
    """Forces what torch.save wrote to the disk, reads it against torch's own checksums, and describes it.

    Raises:
        OSError: it could not be stored, or is not what was written.
    """
    sync(file)
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"{file.name} is not what was written: {error}") from error
    if wrong:
        raise OSError(f"{file.name} is not what was written: the checksum of {wrong} differs")
    return describe_file(file)


def read_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Its files.json.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    files = json.loads((checkpoint / FILES_NAME).read_text())
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    if not all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values()):
        raise ValueError("an entry has no bytes or no sha256")
    return files


def wrong_size(checkpoint: Path) -> str | None:
    """The first thing that keeps a checkpoint from being complete, by names and sizes; None: it is complete."""
    try:
        files = read_files(checkpoint)
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{FILES_NAME} or a file that it names cannot be read: {error}"
    return None


def wrong_content(checkpoint: Path, part: slice = slice(None)) -> str | None:
    """The first of its files whose sha256 is not the one in files.json; None: there is none.

    Args:
        part: of the files in the order of their names; ranks share the reading.
    """
    try:
        for name, expected in sorted(read_files(checkpoint).items())[part]:
            if describe_file(checkpoint / name) != expected:
                return f"{name} has another sha256 than when it was written"
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {error}"
    return None


def step_of(path: Path) -> int | None:
    """20 of global_step20; None: it is no checkpoint, or one that is being written."""
    number = path.name.removeprefix("global_step")
    return int(number) if path.name.startswith("global_step") and number.isdecimal() else None


def tags(folder: Path) -> list[Path]:
    """Checkpoints by their names, complete or not, the newest first."""
    steps = {path: step for path in folder.glob("global_step*") if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def publish(part: Path) -> Path:
    """Gives a folder that ends with .part its own name, at once; what was there is replaced. It survives a power cut.

    Raises:
        OSError: a file that files.json names is not there with its size, or the system refused.
    """
    wrong = wrong_size(part)
    if wrong:
        raise OSError(wrong)
    for path in (*part.iterdir(), part):
        sync(path)
    final = part.with_name(part.name.removesuffix(PART))
    if final.exists():
        shutil.rmtree(final)  # of the same step, damaged: the run went on from an earlier one
    part.rename(final)
    sync(final.parent)
    return final


def remove_parts(folder: Path) -> None:
    """Deletes what earlier attempts left half written; `folder` belongs to one run."""
    for path in folder.glob(f"global_step*{PART}"):
        shutil.rmtree(path)


def parts_bytes(folder: Path) -> int:
    """What `remove_parts` would free."""
    return sum(file.stat().st_size for file in folder.glob(f"global_step*{PART}/*"))


def prune(folder: Path, step: int, keep_latest_k: int) -> None:
    """Keeps the last `keep_latest_k` complete checkpoints of steps up to `step`; what is older than they goes.

    A damaged one does not count, and goes when it is older. A later one may be there, which was passed over.
    """
    earlier = [path for path in tags(folder) if (step_of(path) or 0) <= step]
    kept = [path for path in earlier if wrong_size(path) is None][:keep_latest_k]
    if len(kept) == keep_latest_k:
        for old in earlier[earlier.index(kept[-1]) + 1 :]:
            shutil.rmtree(old)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def total_bytes(files: Iterable[dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files)
