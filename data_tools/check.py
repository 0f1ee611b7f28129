"""Checks a folder of shards against its manifest and index, and that every sample can be used. Reads everything."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from data_tools.build import facts_of
from data_tools.manifest import sha256
from mirage_ds.data.index import Index, IndexEntry, check_digests, load_index
from mirage_ds.data.rows import check_sample
from mirage_ds.data.shard_samples import from_members, parse_members, read_range
from mirage_ds.data.shards import Shard, check_file_size, read_manifest
from mirage_ds.errors import DataError


def check(path: Path) -> Iterator[str]:
    """Yields each fault in a folder of shards as a message with the shard and, if it is in a sample, the key.

    Raises:
        DataError: it is not a folder of shards: the manifest is missing or cannot be read.
    """
    folder = read_manifest(path)
    for shard in folder.manifest.shards:
        yield from _check_shard(path, shard)
    try:
        check_digests(folder)
        index = load_index(folder)
    except DataError as error:
        yield str(error)
        return
    yield from _check_ranges(index, folder.manifest.shards)
    # A missing shard has been reported; its samples are not reported again.
    names = {number: shard.name for number, shard in enumerate(folder.manifest.shards) if (path / shard.name).is_file()}
    for entry in index:
        if entry.shard in names:
            yield from _check_sample(path, names[entry.shard], entry)


def _check_shard(folder: Path, shard: Shard) -> Iterator[str]:
    try:
        check_file_size(folder, shard, "shard")
    except DataError as error:
        yield str(error)
        return
    digest = sha256(folder / shard.name)
    if digest != shard.sha256:
        yield f"the shard has sha256 {digest} ({shard.name}); the manifest says {shard.sha256}; copy it again"


def _check_ranges(index: Index, shards: tuple[Shard, ...]) -> Iterator[str]:
    """The samples of a shard must follow each other from its first byte, and be as many as the manifest says."""
    ends, counts = [0] * len(shards), [0] * len(shards)
    for entry in index:
        if not 0 <= entry.shard < len(shards):
            yield f"the index refers to shard {entry.shard} ({entry.key}); number of shards: {len(shards)}; build again"
            continue
        where = f"{shards[entry.shard].name}/{entry.key}"
        if entry.offset != ends[entry.shard]:
            yield f"the sample starts at byte {entry.offset} ({where}); expected: {ends[entry.shard]}; build again"
        ends[entry.shard] = entry.offset + entry.size
        counts[entry.shard] += 1
    for shard, count in zip(shards, counts, strict=True):
        if count != shard.samples:
            yield f"samples in the index: {count} ({shard.name}); the manifest says {shard.samples}; build again"


def _check_sample(folder: Path, shard: str, entry: IndexEntry) -> Iterator[str]:
    """Reads a sample as the trainer does, decodes its images, and compares it with its index entry."""
    where = f"{shard}/{entry.key}"
    try:
        data = read_range(folder / shard, entry.offset, entry.size, where)
        sample = from_members(where, parse_members(data, entry.key, where))
        check_sample(sample, where)
        facts = facts_of(sample, where)
    except DataError as error:
        yield str(error)
        return
    expected = asdict(entry)
    for name, found in facts.items():
        if found != expected[name]:
            yield f"{name} is {found} ({where}); the index says {expected[name]}; build again"
