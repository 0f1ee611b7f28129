"""Reads a folder of shards: tar files and manifest.json, which data_tools writes. Needs no torch.

The folder is on a disk or on a server (places.py). manifest.json lists the shards with their sha256. Its own sha256,
the digest, identifies the data set.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.data.places import DEFAULT, LocalPlace, Place, Reading, open_place
from mirage_ds.data.remote import NotReadable
from mirage_ds.data.shard import Shard as Shard
from mirage_ds.errors import DataError, StallError
from mirage_ds.paths import Location

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    format_version: int
    num_samples: int
    index_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards with its manifest."""

    place: Place
    manifest: Manifest
    digest: str  # sha256 of manifest.json

    @property
    def path(self) -> Path:
        """The folder on a disk, for what can only be done there.

        Raises:
            DataError: it is on a server.
        """
        if not isinstance(self.place, LocalPlace):
            raise DataError(
                f"the shards are on a server ({self.place}); this needs a folder on a disk of this machine; copy them "
                "to one"
            )
        return self.place.folder

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples


def load_manifest(location: Location, reading: Reading = DEFAULT) -> ShardFolder:
    """Reads manifest.json and checks that all shards exist with their full size; of those on a server, some.

    Raises:
        DataError: there is no manifest, or it has another version, or a shard is missing or of another size.
    """
    shards = read_manifest(location, reading)
    for shard in shards.place.checked(shards.manifest.shards):
        check_shard_size(shards.place, shard)
    return shards


def find_manifest(location: Location, reading: Reading = DEFAULT) -> ShardFolder | None:
    """As `read_manifest`, but None if there is no manifest."""
    try:
        return read_manifest(location, reading)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_manifest(location: Location, reading: Reading = DEFAULT) -> ShardFolder:
    """Reads manifest.json alone.

    Raises:
        DataError: there is no manifest, or it is damaged or has another version.
        StallError: likewise: its server does not answer.
    """
    place = open_place(location, reading)
    where = place.where(MANIFEST_NAME)
    try:
        data = place.read_all(MANIFEST_NAME)
    except OSError as error:
        raise error_of(error)(
            f"no {MANIFEST_NAME}: {error.strerror} ({where}); expected a folder that `mirage-data build` wrote; name "
            "such a folder, or build one"
        ) from error
    return ShardFolder(place, _parse_manifest(data, where), hashlib.sha256(data).hexdigest())


def _parse_manifest(data: bytes, path: str) -> Manifest:
    try:
        fields: dict[str, Any] = json.loads(data)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"format version {version!r:.80} ({path}); this version reads {FORMAT_VERSION}; build the shards again"
            )
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        manifest = Manifest(**fields, shards=shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"damaged manifest: {error!r} ({path}); expected what `mirage-data build` writes; build the shards again"
        ) from error
    found = sum(shard.samples for shard in shards)
    if manifest.num_samples < 1 or found != manifest.num_samples:
        raise DataError(
            f"num_samples is {manifest.num_samples}, the samples of the shards add up to {found} ({path}); both must "
            "be equal, and at least 1; build the shards again"
        )
    return manifest


def check_shard_size(place: Place, shard: Shard) -> None:
    """Refuses a shard that was not copied completely.

    Raises:
        DataError: it is missing, or its size differs from the manifest.
    """
    where = place.where(shard.name)
    try:
        size = place.size(shard.name)
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        raise error_of(error)(
            f"the shard cannot be read: {error.strerror} ({where}); the manifest says {shard.bytes} bytes; copy it "
            "again, or build again"
        ) from error
    else:
        if size == shard.bytes:
            return
        problem = f"has size {size}"
    raise DataError(
        f"the shard {problem} ({where}); the manifest says {shard.bytes} bytes; copy it again, or build again"
    )


def error_of(error: OSError) -> type[DataError]:
    """The kind of error for what could not be read: a server that does not answer may do so at another start."""
    return StallError if isinstance(error, NotReadable) else DataError
