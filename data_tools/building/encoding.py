"""A row as the bytes of its sample in a tar shard: what a worker does with it, and all that takes time."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.building.inputs import RawRow
from data_tools.facts import facts_of
from mirage_ds.data.rows import Sample, parse_row, read_row
from mirage_ds.data.shard_samples import to_members
from mirage_ds.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """A sample, checked, with all its images decoded once."""

    tar: bytes  # its members with headers and padding
    num_bytes: int  # of its members alone, which --maxsize counts
    facts: dict[str, Any]  # see facts_of


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used."""

    where: str
    id: Any  # the row's field; None if it has none
    reason: str


def encode_rows(rows: list[RawRow]) -> list[Encoded | Rejected]:
    """What becomes of each row."""
    return [_encode(row) for row in rows]


def _encode(raw: RawRow) -> Encoded | Rejected:
    row: dict[str, Any] = {}
    try:
        row = raw.content if isinstance(raw.content, dict) else parse_row(raw.content, raw.where)
        sample = read_row(row, key=raw.key, where=raw.where, folder=raw.folder)
        facts = facts_of(sample, row, raw.where)
        members = _members_of(sample, raw.where)
    except DataError as error:
        row_id = row.get("id")
        return Rejected(raw.where, row_id if isinstance(row_id, (str, int, float)) else None, str(error))
    return Encoded(_to_tar(raw.key, members), sum(map(len, members.values())), facts)


def _members_of(sample: Sample, where: str) -> dict[str, bytes]:
    try:
        return to_members(sample)
    except TypeError as error:  # parquet has types that JSON has not
        raise DataError(
            f"a field is no JSON: {error} ({where}); shards keep the other fields of a row as JSON; write the field as "
            "a text or a number, or leave it out"
        ) from error


def _to_tar(key: str, members: Mapping[str, bytes]) -> bytes:
    """As webdataset's TarWriter writes them, with a constant time: the bytes depend on the row only."""
    file = io.BytesIO()
    for name, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mtime, info.mode = len(data), 0, 0o444
        info.uname = info.gname = "bigdata"
        file.write(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return file.getvalue()
