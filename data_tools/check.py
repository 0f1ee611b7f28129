"""Checks a folder of shards against its manifest and index, and that every sample can be used. Reads everything."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

from data_tools.facts import facts_of
from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.index import check_digests, load_index
from mirage_ds.data.places import Place
from mirage_ds.data.rows import check_sample
from mirage_ds.data.shard_samples import from_members, parse_members, read_range
from mirage_ds.data.shards import MANIFEST_NAME, Shard, check_file_size, read_manifest
from mirage_ds.errors import DataError
from mirage_ds.paths import Location


def check(location: Location) -> Iterator[str]:
    """Yields each fault in a folder of shards as a message with the shard and, if it is in a sample, the key.

    Raises:
        DataError: it is not a folder of shards: the manifest is missing or cannot be read, or its server
            gives no ranges of bytes.
    """
    folder = read_manifest(location)
    with suppress(OSError):  # reported of each file below; a server without ranges of bytes ends the check here
        folder.place.size(MANIFEST_NAME)
    for shard in folder.manifest.shards:
        yield from _check_shard(folder.place, shard)
    try:
        check_digests(folder)
        index = load_index(folder)
    except DataError as error:
        yield str(error)
        return
    yield from _check_ranges(index, folder.manifest.shards)
    # A missing shard has been reported; its samples are not reported again.
    there = {number for number, shard in enumerate(folder.manifest.shards) if _is_there(folder.place, shard)}
    for entry in index:
        if entry.shard in there:
            yield from _check_sample(folder.place, folder.manifest.shards[entry.shard], entry)


def _check_shard(place: Place, shard: Shard) -> Iterator[str]:
    digest = hashlib.sha256()
    try:
        check_file_size(place, shard, "shard")
        for piece in place.pieces(shard.name):
            digest.update(piece)
    except (DataError, OSError) as error:
        yield str(error)
        return
    if (found := digest.hexdigest()) != shard.sha256:
        yield f"the shard has sha256 {found} ({shard.name}); the manifest says {shard.sha256}; copy it again"


def _is_there(place: Place, shard: Shard) -> bool:
    try:
        place.size(shard.name)
    except OSError:
        return False
    return True


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


def _check_sample(place: Place, shard: Shard, entry: IndexEntry) -> Iterator[str]:
    """Reads a sample as the trainer does, decodes its images, and compares it with its index entry."""
    where = f"{shard.name}/{entry.key}"
    try:
        data = read_range(place, shard, entry.offset, entry.size, where)
        sample = from_members(where, parse_members(data, entry.key, where))
        check_sample(sample, where)
        facts = facts_of(sample, {}, where)
    except DataError as error:
        yield str(error)
        return
    expected = asdict(entry)
    for name, found in facts.items():
        if found != expected[name]:
            yield f"{name} is {found} ({where}); the index says {expected[name]}; build again"
