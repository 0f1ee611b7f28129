"""What became of the rows: counted in report.json, and each row that was left out in left_out.jsonl."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_tools.importing.output import Output
from data_tools.importing.source_rows import LeftOutError, SourceRow
from mirage_ds.errors import DataError

REPORT_NAME, LEFT_OUT_NAME = "report.json", "left_out.jsonl"
NUM_LISTED = 5  # rows that were left out, in messages
_MAX_NAMES = 1000  # that are counted one by one, so that memory does not depend on the rows
_OTHERS = "others"


class Report:
    """Counts the rows while they are read."""

    def __init__(self, format_name: str, sources: Iterable[str], folder: Path) -> None:
        self.format_name, self.sources = format_name, list(sources)
        self.num_read = self.num_taken = 0
        self.file_taken: dict[str, bool] = {}  # of each file of rows, whether a row of it was taken
        self.left_out: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # a row of each reason, to name some
        self.file = (folder / LEFT_OUT_NAME).open("w", encoding="utf-8")

    def take(self, row: SourceRow, file: str) -> None:
        self.file_taken[file] = True
        self.num_read += 1
        self.num_taken += 1
        for name in row.ignored():
            _count(self.ignored, name)

    def leave_out(self, where: str, file: str, row_id: Any, error: DataError) -> None:
        self.num_read += 1
        reason = reason_in(error)
        _count(self.left_out, reason)
        self.file_taken.setdefault(file, False)
        if len(self.first) < NUM_LISTED:
            self.first.setdefault(reason, f"{where}: {error}")
        line = {"where": where, "id": row_id if isinstance(row_id, (str, int)) else None, "reason": str(error)}
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.file.close()

    def write(self, folder: Path, output: Output) -> None:
        """Writes report.json; left_out.jsonl stays only if it has a row."""
        report = {
            "format": self.format_name,
            "sources": self.sources,
            "rows_read": self.num_read,
            "rows_taken": self.num_taken,
            "rows_written": output.num_rows,
            "images_written": output.num_images,
            "tiny_parts": output.num_tiny_parts,
            "left_out": dict(self.left_out.most_common()),
            "fields_ignored": dict(self.ignored.most_common()),
            "files_not_taken": self.files_not_taken,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
        if not self.left_out:
            (folder / LEFT_OUT_NAME).unlink()

    @property
    def files_not_taken(self) -> list[str]:
        """The files that have rows, of which none was taken: perhaps of another format."""
        return [file for file, taken in self.file_taken.items() if not taken]

    def reasons(self) -> str:
        """How many rows were left out for each reason, the most frequent first."""
        return ", ".join(f"{reason}: {number}" for reason, number in self.left_out.most_common())


def reason_in(error: DataError) -> str:
    """What many rows have in common of a message: its beginning, without numbers and values."""
    if isinstance(error, LeftOutError):
        return error.reason
    without_value = re.sub(r""": ('[^']*'|"[^"]*")""", "", str(error))
    return re.sub(r"\b\d+", "N", re.split(r":| \(|;", without_value)[0])


def _count(counter: Counter[str], name: str) -> None:
    counter[name if name in counter or len(counter) < _MAX_NAMES else _OTHERS] += 1
