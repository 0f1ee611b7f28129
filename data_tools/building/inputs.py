"""Rows of JSONL and parquet files as a stream, file after file, from any place on. Parses no JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mirage_ds.data.rows import count_rows, read_lines
from mirage_ds.errors import DataError, reason_of

PARQUET_SUFFIXES = (".parquet", ".pq")
_BATCH_ROWS = 64  # of a parquet file in memory; a row may have its images


class Place(NamedTuple):
    """Between two rows: where reading may continue."""

    source: int  # number of the input
    offset: int  # in that input: bytes of a JSONL file, rows of a parquet file
    line: int  # lines of the JSONL file before it
    rows: int  # rows of all inputs before it


START = Place(0, 0, 0, 0)


@dataclass(frozen=True)
class RawRow:
    """A row that was not looked at: the bytes of a JSONL line, or the fields of a parquet file's row."""

    number: int  # of all rows of all inputs, from 0
    where: str  # file:line, or the file and its row
    folder: Path  # where its images' paths begin
    content: bytes | dict[str, Any]
    after: Place
    fraction: float  # of all that is read, up to the end of this row

    @property
    def key(self) -> str:
        return f"{self.number:09d}"

    @property
    def num_bytes(self) -> int:
        """About what it takes to hand it to a worker."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(data) for data in _bytes_in(list(self.content.values())))


class Rows(Protocol):
    """Rows in the order in which they are built."""

    def read(self, place: Place) -> Iterator[RawRow]:
        """All rows from a place on, which is START or was the `after` of a row."""


class InTheirOrder:
    """The rows of several inputs, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def read(self, place: Place) -> Iterator[RawRow]:
        """
        Raises:
            DataError: a file cannot be read, or has no row; pyarrow is missing, or cannot read a file.
        """
        sizes = [_size(path) for path in self.paths]
        for source, path in enumerate(self.paths):
            if source < place.source:
                continue
            start = place if source == place.source else Place(source, 0, 0, place.rows)
            reader = _parquet_rows if is_parquet(path) else _json_lines
            for where, content, place, read_bytes in reader(path, start):
                fraction = (sum(sizes[:source]) + read_bytes) / sum(sizes)
                yield RawRow(place.rows - 1, where, path.parent, content, place, fraction)


def is_parquet(path: Path) -> bool:
    return path.suffix in PARQUET_SUFFIXES


def count_all_rows(paths: Sequence[Path]) -> int:
    """Counts the rows of several inputs, usable or not.

    Raises:
        DataError: see `InTheirOrder.read`.
    """
    return sum(open_parquet(path).metadata.num_rows if is_parquet(path) else count_rows(path) for path in paths)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror} ({path}); name an existing file") from error


_Read = Iterator[tuple[str, bytes | dict[str, Any], Place, float]]


def _json_lines(path: Path, start: Place) -> _Read:
    rows = start.rows
    for number, offset, line in read_lines(path, start.offset, start.line):
        rows += 1
        yield f"{path}:{number}", line, Place(start.source, offset, number, rows), offset


def _parquet_rows(path: Path, start: Place) -> _Read:
    """Row group by row group; a column that is null in a row counts as missing there."""
    file = open_parquet(path)
    num_rows, first = file.metadata.num_rows, 0
    if not num_rows:
        raise DataError(f"no rows ({path}); the file needs at least one; write some rows to it")
    for name, count in Counter(file.schema_arrow.names).items():
        if count > 1:
            raise DataError(
                f"several columns have the name {name!r:.80} ({path}); each field of a row needs its own; rename them, "
                "or leave all but one out"
            )
    for group in range(file.metadata.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        if end > start.offset:
            for number, row in enumerate(_rows_of_group(file, group, path), start=first):
                if number >= start.offset:
                    fields = {name: value for name, value in row.items() if value is not None}
                    place = Place(start.source, number + 1, 0, start.rows + number + 1 - start.offset)
                    yield f"{path}, row {number}", fields, place, _size(path) * (number + 1) / num_rows
        first = end


def _rows_of_group(file: Any, group: int, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
            yield from _to_rows(batch, group, path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise DataError(
            f"row group {group} cannot be read: {reason_of(error)} ({path}); expected a whole parquet file; write or "
            "copy it again"
        ) from error


def _to_rows(batch: Any, group: int, path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (OverflowError, ValueError) as error:  # times, which parquet has in a wider range and finer than Python
        raise DataError(
            f"row group {group} has a value that Python has not: {error} ({path}); allowed: texts, numbers, bytes, and "
            "lists and structs of them; write the field as a text or a number, or leave it out"
        ) from error
    return rows


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile that reads in small pieces.

    Raises:
        DataError: pyarrow is missing, or the file cannot be read.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"rows in parquet need pyarrow, which is not installed ({path}); allowed without it: JSONL; install the "
            "extra: pip install 'mirage_ds[parquet]'"
        ) from error
    try:
        return parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the rows: {reason_of(error)} ({path}); expected a parquet file; name one, or write it again"
        ) from error


def check_different(paths: Sequence[Path]) -> None:
    """Refuses a file that is named twice, by whatever path.

    Raises:
        DataError: its rows would be twice in the data set, and, with --val-fraction, in both parts.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise DataError(
                f"an input is named twice ({other} and {path}); each file may be read once, or its rows would be twice "
                "in the data set; leave one out"
            )


def fingerprint(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What tells other rows from these: place, size and time of each file."""
    try:
        found = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise DataError(
            f"cannot read the rows: {error.strerror} ({error.filename}); name an existing JSONL or parquet file"
        ) from error
    return [{"path": str(path.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for path, stat in found]


def _bytes_in(values: list[Any]) -> Iterator[bytes | str]:
    for value in values:
        if isinstance(value, (bytes, str)):
            yield value
        elif isinstance(value, (list, dict)):
            yield from _bytes_in(list(value.values() if isinstance(value, dict) else value))
