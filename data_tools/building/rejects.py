"""The rows that cannot be used: how many are too many, and the file that lists them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.building.encoding import Rejected
from mirage_ds.errors import DataError

REJECTS_NAME = "rejects.jsonl"
NUM_REJECTS_LISTED = 5  # in the message


def check_rejects(rejects: Sequence[Rejected], max_rejects: int, rows_read: int | None = None) -> None:
    """Refuses more than `max_rejects`.

    Args:
        rows_read: rows before the place where reading ended; None: all were read.

    Raises:
        DataError: the message lists the first few.
    """
    if len(rejects) <= max_rejects:
        return
    listed = "".join(f"\n  - {rejected.reason}" for rejected in rejects[:NUM_REJECTS_LISTED])
    more = len(rejects) - NUM_REJECTS_LISTED
    among = "" if rows_read is None else f" of the first {rows_read}, where reading ended"
    raise DataError(
        f"unusable rows: {len(rejects)}{among}{listed}" + (f"\n  - and {more} more" if more > 0 else "") + "\n"
        f"no output was written; fix the rows, or raise --max-rejects (now {max_rejects})"
    )


def as_lines(rejects: Sequence[Rejected]) -> list[dict[str, Any]]:
    """The objects of rejects.jsonl: `where`, `id` and `reason`."""
    return [asdict(rejected) for rejected in rejects]


def write_rejects(folder: Path, rejects: Sequence[Rejected]) -> None:
    """Writes rejects.jsonl, if there are any."""
    if rejects:
        (folder / REJECTS_NAME).write_text("".join(json.dumps(line) + "\n" for line in as_lines(rejects)))


def read_rejects(folder: Path) -> list[Rejected]:
    """The rejected rows of a folder of shards."""
    path = folder / REJECTS_NAME
    return [Rejected(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
