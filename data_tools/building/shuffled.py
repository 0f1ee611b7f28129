"""Rows of JSONL files in a pseudo-random order, in little memory: a file says where each row begins."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_tools.building.inputs import START, InTheirOrder, Place, RawRow, is_parquet
from mirage_ds.data.plan import order_key, permute
from mirage_ds.errors import DataError

_BEGIN = struct.Struct("<HQQ")  # of a row: number of the input, bytes and lines before it; first: 0, 0, number of rows
_AT_A_TIME = 1024  # places of the order that are computed together


class Shuffled:
    """The rows of several JSONL files in an order that depends on their number and the seed alone."""

    def __init__(self, paths: Sequence[Path], seed: int, folder: Path) -> None:
        """Reads all files once, if an earlier start has not done so.

        Args:
            folder: for the file with the rows' beginnings, 18 bytes a row.

        Raises:
            DataError: a file cannot be read, has no row, or is parquet.
        """
        check_can_shuffle(paths)
        self.paths, self.seed = paths, seed
        self.begins = folder / "begins"
        if (num_rows := _rows_in(self.begins)) is None:
            num_rows = _write_begins(paths, self.begins)
        self.num_rows = num_rows

    def read(self, place: Place) -> Iterator[RawRow]:
        """As InTheirOrder's; `place.rows` counts in this order."""
        key = order_key("rows", self.seed, 0)
        with ExitStack() as until_the_end:
            begins = until_the_end.enter_context(self.begins.open("rb", buffering=0))
            files = [until_the_end.enter_context(path.open("rb")) for path in self.paths]
            for first in range(place.rows, self.num_rows, _AT_A_TIME):
                places = np.arange(first, min(first + _AT_A_TIME, self.num_rows), dtype=np.int64)
                for at, number in zip(places.tolist(), permute(places, self.num_rows, key).tolist(), strict=True):
                    data = os.pread(begins.fileno(), _BEGIN.size, (1 + number) * _BEGIN.size)
                    source, offset, line = _BEGIN.unpack(data)
                    files[source].seek(offset)
                    yield RawRow(
                        number,
                        f"{self.paths[source]}:{line + 1}",
                        self.paths[source].parent,
                        files[source].readline(),
                        Place(0, 0, 0, at + 1),
                        (at + 1) / self.num_rows,
                    )


def check_can_shuffle(paths: Sequence[Path]) -> None:
    """Refuses parquet: a single row of it cannot be read without its row group.

    Raises:
        DataError: the message names the file.
    """
    for path in filter(is_parquet, paths):
        raise DataError(
            f"rows in parquet cannot be shuffled ({path}): a row group is read as a whole; allowed with "
            "--shuffle-seed: JSONL; shuffle the rows where the file is written, or leave the option out: training "
            "shuffles samples anyway"
        )


def _rows_in(begins: Path) -> int | None:
    """How many rows there are; None: there is no such file, or a machine that stopped has left a part of it."""
    try:
        with begins.open("rb") as file:
            size, first = os.fstat(file.fileno()).st_size, file.read(_BEGIN.size)
    except FileNotFoundError:
        return None
    if len(first) < _BEGIN.size:
        return None
    num_rows: int = _BEGIN.unpack(first)[2]
    return num_rows if size == (1 + num_rows) * _BEGIN.size else None


def _write_begins(paths: Sequence[Path], to: Path) -> int:
    """Returns the number of rows."""
    new, num_rows = to.with_suffix(".tmp"), 0
    with new.open("wb") as file:
        file.write(bytes(_BEGIN.size))
        for row in InTheirOrder(paths).read(START):
            begin = row.after.offset - len(row.content)  # a byte order mark is not of the row, nor of its content
            file.write(_BEGIN.pack(row.after.source, begin, row.after.line - 1))
            num_rows += 1
        file.seek(0)
        file.write(_BEGIN.pack(0, 0, num_rows))
        file.flush()
        os.fsync(file.fileno())
    new.replace(to)
    return num_rows
