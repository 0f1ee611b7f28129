"""Cuts samples into tar shards, and keeps for each finished one a file with what a later start has to know of it.

FOLDER/shard-000000.tar     as webdataset's ShardWriter cuts and writes it
FACTS/shard-000000.json     written when the shard is complete: its manifest entry, its index entries, where to continue
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.building.encoding import Encoded, Rejected
from data_tools.building.inputs import START, Place, RawRow
from mirage_ds.data.columns import IndexEntry
from mirage_ds.data.shards import Shard

SHARD_PATTERN = "shard-%06d.tar"


class ShardWriter:
    """The shards of one folder."""

    def __init__(self, folder: Path, facts: Path, *, maxcount: int, maxsize: int) -> None:
        """Continues after the last complete shard, and deletes all that is not of complete ones.

        Args:
            maxcount: samples after which a shard is complete.
            maxsize: bytes of members after which it is.
        """
        self.folder, self.facts_folder, self.maxcount, self.maxsize = folder, facts, maxcount, maxsize
        folder.mkdir(exist_ok=True)
        facts.mkdir(parents=True, exist_ok=True)
        self.shards: list[Shard] = []
        self.rejects: list[tuple[int, Rejected]] = []
        """With the place of each in the order of rows; those since the last complete shard will be found again."""
        self.next = START  # rows before it are in complete shards
        while (record := self._complete(len(self.shards))) is not None:
            self.shards.append(Shard(**record["shard"]))
            self.rejects += [(place, Rejected(**rejected)) for place, rejected in record["rejects"]]
            self.next = Place(*record["next"])
        names = {shard.name for shard in self.shards}
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in names:
                path.unlink()
        self._begin()

    def _complete(self, number: int) -> dict[str, Any] | None:
        """What is kept of a shard, if it is complete."""
        path = self._facts_of(number)
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_bytes())
        shard = self.folder / record["shard"]["name"]
        return record if shard.is_file() and shard.stat().st_size == record["shard"]["bytes"] else None

    def _facts_of(self, number: int) -> Path:
        return self.facts_folder / f"{SHARD_PATTERN % number}".replace(".tar", ".json")

    def _begin(self) -> None:
        self._file: BinaryIO | None = None
        self._entries: list[dict[str, Any]] = []
        self._new_rejects: list[tuple[int, Rejected]] = []
        self._members_bytes = 0
        self._after = self.next
        self._digest = hashlib.sha256()

    def reject(self, row: RawRow, rejected: Rejected) -> None:
        """Notes a row that is left out."""
        self.rejects.append((row.after.rows, rejected))
        self._new_rejects.append((row.after.rows, rejected))

    def add(self, row: RawRow, sample: Encoded) -> bool:
        """Writes a sample; returns whether its shard is complete now."""
        if self._file is None:
            self._file = (self.folder / (SHARD_PATTERN % len(self.shards))).open("wb")
        position = {"key": row.key, "shard": len(self.shards), "offset": self._file.tell(), "size": len(sample.tar)}
        self._entries.append({**position, **sample.facts})
        self._write(sample.tar)
        self._members_bytes += sample.num_bytes
        self._after = row.after
        if len(self._entries) < self.maxcount and self._members_bytes < self.maxsize:
            return False
        self.finish_shard()
        return True

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def finish_shard(self) -> None:
        """Completes the shard that has begun, if there is one."""
        if self._file is None:
            return
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE  # two empty blocks, filled up to a record
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        num_bytes = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())  # on the disk before the file that says that it is complete
        self._file.close()
        number = len(self.shards)
        shard = Shard(SHARD_PATTERN % number, len(self._entries), num_bytes, self._digest.hexdigest())
        record = {
            "shard": asdict(shard),
            "next": self._after,
            "rejects": [(place, asdict(each)) for place, each in self._new_rejects if place <= self._after.rows],
            "entries": self._entries,
        }
        write_at_once(self._facts_of(number), json.dumps(record))
        self.shards.append(shard)
        self.next = self._after
        self._begin()

    def close(self) -> None:
        """Leaves a shard that has begun as it is."""
        if self._file is not None:
            self._file.close()

    def entries(self) -> Iterator[IndexEntry]:
        """The index entries of all complete shards, one shard in memory at a time."""
        for number in range(len(self.shards)):
            for entry in json.loads(self._facts_of(number).read_bytes())["entries"]:
                yield IndexEntry(**entry)


def write_at_once(path: Path, text: str) -> None:
    """A file that is either complete or does not exist."""
    new = path.with_name(f"{path.name}.tmp")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
