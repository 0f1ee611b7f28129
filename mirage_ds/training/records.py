"""Files of records, a JSON object per line. A resumed run repeats the steps after its checkpoint: their old ones go."""

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.housekeeping import housekeeping, warn_once


class Records:
    """A file with a JSON object per line, in order of steps. If it cannot be written, lines are missing."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path = path
        kept = _keep_until(path, steps_done)
        self.last: dict[str, Any] | None = json.loads(kept[-1]) if kept else None  # of an earlier start
        self.file = path.open("a")

    def add(self, *records: dict[str, Any]) -> None:
        with self.housekeeping():
            self.file.writelines(strict_json.dumps(record) + "\n" for record in records)
            self.file.flush()

    def close(self) -> None:
        with self.housekeeping():
            self.file.close()

    def housekeeping(self) -> AbstractContextManager[None]:
        return housekeeping(f"lines are missing ({self.path})", "the log has the same losses")


def _keep_until(path: Path, step: int) -> list[str]:
    """Drops a file's records after `step`, and a last line that a kill cut short; returns the lines that are left."""
    if step == 0 and path.exists() and path.stat().st_size:
        kept = path.with_suffix(f".{time.time_ns()}.jsonl")
        path.rename(kept)  # a run that ended before its first checkpoint; this one starts over
        print(f"{kept.name}: what {path.name} had of an earlier start that saved no checkpoint", flush=True)
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    steps = {number: step_of(line) for number, line in enumerate(lines, start=1)}
    bad = [number for number, found in steps.items() if found is None and lines[number - 1].endswith("\n")]
    if bad:
        warn_once(f"{path} has lines that are no records of steps, which are dropped: {', '.join(map(str, bad)):.80}")
    left = [lines[number - 1] for number, found in steps.items() if found is not None and found <= step]
    new = path.with_suffix(".new")
    new.write_text("".join(left))
    new.replace(path)
    return left


def step_of(line: str) -> int | None:
    """The step of a record; None if the line is none, or was cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if line.endswith("\n") and isinstance(step, int) else None
