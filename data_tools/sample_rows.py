"""Some rows of a folder of shards, to look at: spread evenly over it, or the first that have a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mirage_ds import strict_json
from mirage_ds.data.columns import IndexEntry
from mirage_ds.data.index import load_index
from mirage_ds.data.rows import Sample
from mirage_ds.data.shard_samples import from_members, parse_members, read_range
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.spread import spread
from mirage_ds.errors import DataError


@dataclass(frozen=True)
class Row:
    """A row with its place in the folder."""

    number: int  # from 0
    shard: str
    entry: IndexEntry
    sample: Sample


def spread_rows(folder: ShardFolder, count: int) -> list[Row]:
    """At most `count` rows, spread evenly over the folder."""
    index = load_index(folder)
    return [read_row(folder, index[number], number) for number in spread(len(index), count)]


def first_rows(folder: ShardFolder, count: int) -> list[Row]:
    """The first rows."""
    return list(islice(_all(folder), count))


def matching_rows(folder: ShardFolder, count: int, text: str) -> list[Row]:
    """The first rows that have `text` in a question or an answer, whatever the case of its letters.

    Raises:
        DataError: none has it.
    """
    wanted = text.casefold()
    found = (row for row in _all(folder) if any(wanted in turn.text.casefold() for turn in row.sample.turns))
    rows = list(islice(found, count))
    if not rows:
        raise DataError(
            f"no row has this text (--match {text:.80}): rows of {folder.place}: {folder.num_samples}; expected a text "
            "in the question or the answer of a row; use another one"
        )
    return rows


def _all(folder: ShardFolder) -> Iterator[Row]:
    for number, entry in enumerate(load_index(folder)):
        yield read_row(folder, entry, number)


def read_row(folder: ShardFolder, entry: IndexEntry, number: int) -> Row:
    """Reads a row as the trainer does.

    Raises:
        DataError: it cannot be read; the message has SHARD/KEY.
    """
    shard = folder.manifest.shards[entry.shard]
    where = f"{shard.name}/{entry.key}"
    data = read_range(folder.place, shard, entry.offset, entry.size, where)
    return Row(number, shard.name, entry, from_members(where, parse_members(data, entry.key, where)))


def as_text(value: Any) -> str:
    """A field of a row: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else strict_json.dumps(value)
