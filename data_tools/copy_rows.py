"""Copies rows of a folder of shards into a new one: the bytes of their members, no image is built again."""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.building.shard_writer import SHARD_PATTERN
from data_tools.manifest import describe_shard, write_manifest
from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.ragged import starts
from mirage_ds.data.shard_samples import read_range
from mirage_ds.data.shards import Manifest, Shard, ShardFolder
from mirage_ds.errors import DataError

Numbers = npt.NDArray[np.int64]
_END_BLOCKS = 2  # of zeros, at the end of a tar file


def copy_rows(
    folder: ShardFolder,
    index: Index,
    numbers: Numbers,
    output: Path,
    *,
    maxcount: int,
    maxsize: int,
) -> Manifest:
    """Writes shards, index and manifest of these rows, which keep their keys and their order.

    Args:
        numbers: of the rows in `index`, ascending, at least one.
        output: an existing empty folder.
        maxcount: maximum samples per shard.
        maxsize: bytes after which the next sample starts a new shard.
    Raises:
        DataError: a shard that has one of the rows is damaged, or cannot be read.
    """
    sizes = index.samples["size"][numbers]
    cuts = cut(sizes, maxcount, maxsize)
    shards, checked = [], set[int]()
    for shard, rows in enumerate(cuts):
        path = output / (SHARD_PATTERN % shard)
        with path.open("wb") as file:
            for entry in index.take(numbers[rows]):
                source = folder.manifest.shards[entry.shard]
                if entry.shard not in checked:
                    check_digest(folder, source)
                    checked.add(entry.shard)
                where = f"{source.name}/{entry.key}"
                file.write(read_range(folder.place, source, entry.offset, entry.size, where))
            # As tarfile ends its files: a whole number of records.
            end = file.tell() + _END_BLOCKS * tarfile.BLOCKSIZE
            file.truncate(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
        shards.append(describe_shard(path, rows.stop - rows.start))

    def entries() -> Iterator[IndexEntry]:
        for shard, rows in enumerate(cuts):
            for entry, offset in zip(index.take(numbers[rows]), starts(sizes[rows]).tolist(), strict=True):
                yield replace(entry, shard=shard, offset=offset)

    return write_manifest(output, shards, entries())


def cut(sizes: Numbers, maxcount: int, maxsize: int) -> list[slice]:
    """The rows of each shard, from the bytes of each row."""
    cuts, start, end = [], 0, 0
    ends = np.cumsum(sizes)
    while start < len(sizes):
        before = int(ends[start] - sizes[start])
        full = int(np.searchsorted(ends, before + maxsize)) + 1  # the row that reaches the limit still belongs to it
        end = min(start + maxcount, full, len(sizes))
        cuts.append(slice(start, end))
        start = end
    return cuts


def check_digest(folder: ShardFolder, shard: Shard) -> None:
    """Refuses a damaged shard, whose rows would get a new digest that says nothing of the damage.

    Raises:
        DataError: its bytes are not those of the manifest.
    """
    try:
        found = describe_shard(folder.path / shard.name, shard.samples)
    except OSError as error:
        raise DataError(
            f"cannot read the shard: {error.strerror} ({folder.path / shard.name}); rows are copied from it; restore it"
        ) from error
    if found != shard:
        raise DataError(
            f"the shard has sha256 {found.sha256:.12} ({folder.path / shard.name}); the manifest says "
            f"{shard.sha256:.12}; nothing was written; copy the shard again, or build again"
        )
