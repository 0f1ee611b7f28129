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

_BEGIN = struct.Struct("<HQQ")  # of a row: number of the input, bytes and lines before it
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
        if not self.begins.exists():
            _write_begins(paths, self.begins)
        self.num_rows = self.begins.stat().st_size // _BEGIN.size

    def read(self, place: Place) -> Iterator[RawRow]:
        """As InTheirOrder's; `place.rows` counts in this order."""
        key = order_key("rows", self.seed, 0)
        with ExitStack() as until_the_end:
            begins = until_the_end.enter_context(self.begins.open("rb", buffering=0))
            files = [until_the_end.enter_context(path.open("rb")) for path in self.paths]
            for first in range(place.rows, self.num_rows, _AT_A_TIME):
                places = np.arange(first, min(first + _AT_A_TIME, self.num_rows), dtype=np.int64)
                for at, number in zip(places.tolist(), permute(places, self.num_rows, key).tolist(), strict=True):
                    data = os.pread(begins.fileno(), _BEGIN.size, number * _BEGIN.size)
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


def _write_begins(paths: Sequence[Path], to: Path) -> None:
    new = to.with_suffix(".tmp")
    with new.open("wb") as file:
        for row in InTheirOrder(paths).read(START):
            begin = row.after.offset - len(row.content)  # a byte order mark is not of the row, nor of its content
            file.write(_BEGIN.pack(row.after.source, begin, row.after.line - 1))
    new.replace(to)
