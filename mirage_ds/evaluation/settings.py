"""All that decides the answers of an evaluation: what a killed one must agree with to be continued."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mirage_ds.evaluation.answers import Row
from mirage_ds.paths import expand


def digests(model: str, task: str, rows: Sequence[Row]) -> dict[str, str | None]:
    """What the files hold that the options name: those of the model, of the task, and the rows."""
    return {"model_files": _of_folder(Path(model)), "task_file": _of_task(task), "rows": _of_rows(rows)}


def _of_folder(folder: Path) -> str | None:
    """Of the names, sizes and times of a model's files; None for a hub id.

    Another export into the same folder has other times. To hash the weights instead would take a minute at each start.
    """
    if not folder.is_dir():
        return None
    files = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return _sha256(json.dumps([(name, facts.st_size, facts.st_mtime_ns) for name, facts in files]).encode())


def _of_task(task: str) -> str | None:
    """Of the file of a task of the user's own, FILE.py:FUNCTION; None for another task."""
    file = Path(expand(task.rpartition(":")[0]))
    return _sha256(file.read_bytes()) if file.is_file() else None


def _of_rows(rows: Sequence[Row]) -> str:
    """Of the questions, their images and their other fields; not of helper images, which only some arms read."""
    facts = []
    for row in rows:
        sample = row.sample
        images = [_sha256(image) for image in sample.input_images]
        facts.append([sample.text_input, sample.text_output, sample.extra, images])
    return _sha256(json.dumps(facts, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
