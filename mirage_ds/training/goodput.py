"""Goodput: the share of a run's time that has become steps, over all its starts.

    goodput = seconds in steps that counted / seconds since the run's first start

A step counts if its result is kept: not if it was skipped, and once if it was repeated after a resume. The rest is
loading, validating, saving, waiting in a queue, and what a killed start had done since its last checkpoint.

RUN/metrics.jsonl       each record has the first start and the seconds counted so far; a resume drops those after its
                        checkpoint
RUN/first_start.json    {"time": 1780000000.0}, written once, or again if it is damaged; read while there is no record
"""

import json
import time
from pathlib import Path
from typing import Any

from mirage_ds.errors import MALFORMED

NAME = "first_start.json"


def note_first_start(run_dir: Path, began: float) -> None:
    """Writes when the run first started, unless an earlier start has.

    Args:
        began: when this start began, in seconds since the epoch.
    """
    if read_first_start(run_dir) is None:
        file = run_dir / NAME
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"time": began}) + "\n")
        new.replace(file)


def read_first_start(run_dir: Path) -> float | None:
    """In seconds since the epoch; None if the file is missing or damaged, as a full disk or a lost node leaves it."""
    try:
        return float(json.loads((run_dir / NAME).read_text())["time"])
    except MALFORMED:
        return None


class Goodput:
    """The account of rank 0."""

    def __init__(self, run_dir: Path, last_record: dict[str, Any] | None) -> None:
        """
        Args:
            last_record: of metrics.jsonl, at the checkpoint that the run resumes from, if it does.
        """
        if last_record and "first_start" in last_record:  # records of older versions do not have it
            self.first_start, self.counted_s = last_record["first_start"], last_record["counted_s"]
        else:
            self.first_start, self.counted_s = read_first_start(run_dir) or time.time(), 0.0

    def add(self, step_s: float, *, ago_s: float, skipped: bool) -> float:
        """Counts a step that ended `ago_s` seconds ago; the goodput up to then."""
        self.counted_s += 0.0 if skipped else step_s
        # This host's clock may be behind that of the first start; at least what was counted has passed.
        passed_s = max(time.time() - ago_s - self.first_start, self.counted_s)
        return self.counted_s / passed_s if passed_s else 0.0
