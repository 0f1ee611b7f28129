"""Reads a folder of shards: tar files and manifest.json, which data_tools writes. Needs no torch.

The folder is on a disk or on a server (places.py). manifest.json lists the shards and the files of the index with
their sha256. Its own sha256, the digest, identifies the data set. Where `mirage-data upgrade` wrote it, the digest
stays that of the manifest before: it is the same data set.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.data.cache import WrongContent
from mirage_ds.data.places import DEFAULT, LocalPlace, Place, Reading, open_place
from mirage_ds.data.remote import NotReadable, RemotePlace
from mirage_ds.data.shard import Shard as Shard
from mirage_ds.errors import DataError, StallError, WrongShardError
from mirage_ds.paths import Location

FORMAT_VERSION = 2  # that is written; 1 is read too
MANIFEST_NAME = "manifest.json"
_NAME = re.compile(r"(index/)?\w[\w.-]{0,200}", re.ASCII)  # of a file in the folder, never outside it


@dataclass(frozen=True)
class IndexFile:
    """One file of the index, see index.py."""

    name: str  # its path in the folder of shards
    bytes: int | None  # None: format 1 does not say; its digest is compared whenever it is read
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    format_version: int
    num_samples: int
    index: tuple[IndexFile, ...]
    shards: tuple[Shard, ...]
    upgraded_from: str | None = None  # digest of the folder before `mirage-data upgrade`


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards with its manifest."""

    place: Place
    manifest: Manifest
    digest: str  # sha256 of manifest.json, or of the one that was upgraded

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
    """Reads manifest.json and checks that all shards and the index exist with their full size; on a server, some.

    Raises:
        DataError: there is no manifest, or it has another version, or a file is missing or of another size.
    """
    shards = read_manifest(location, reading)
    for shard in shards.place.checked(shards.manifest.shards):
        check_file_size(shards.place, shard, "shard")
    if shards.manifest.format_version > 1:
        for file in shards.place.checked(shards.manifest.index):
            check_file_size(shards.place, file, "index file")
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
        if isinstance(place, RemotePlace) and not isinstance(error, FileNotFoundError):
            raise error_of(error)(
                f"the shards cannot be read: {error.strerror} ({where}); expected a server that answers; check the "
                "address, network and credentials"
            ) from error
        raise error_of(error)(
            f"no {MANIFEST_NAME}: {error.strerror} ({where}); expected a folder that `mirage-data build` wrote; name "
            "such a folder, or build one"
        ) from error
    manifest = _parse_manifest(data, where)
    return ShardFolder(place, manifest, manifest.upgraded_from or hashlib.sha256(data).hexdigest())


def _parse_manifest(data: bytes, path: str) -> Manifest:
    try:
        fields: dict[str, Any] = json.loads(data)
        version = fields["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise DataError(
                f"format version {version!r:.80} ({path}); this version reads 1 and {FORMAT_VERSION}; build the shards "
                "again"
            )
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        if version == 1:
            index: tuple[IndexFile, ...] = (IndexFile("index.jsonl", None, fields.pop("index_sha256")),)
        else:
            index = tuple(IndexFile(**file) for file in fields.pop("index"))
        manifest = Manifest(**fields, index=index, shards=shards)
        _check_types(manifest)
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


def _check_types(manifest: Manifest) -> None:
    """
    Raises:
        ValueError: a field has another form than what is written.
        TypeError: likewise: it should be a text.
    """
    files: list[IndexFile | Shard] = [*manifest.index, *manifest.shards]
    for file in files:
        if not _NAME.fullmatch(file.name):
            raise ValueError(f"{file.name!r:.80} is no name of a file in the folder")
    digests = [file.sha256 for file in files]
    for digest in digests if manifest.upgraded_from is None else (*digests, manifest.upgraded_from):
        if not isinstance(digest, str):
            raise TypeError(f"{digest!r:.80} is no sha256")
    sizes = [file.bytes for file in files if manifest.format_version > 1 or isinstance(file, Shard)]
    for number in (manifest.num_samples, *sizes, *(shard.samples for shard in manifest.shards)):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r:.80} is no number of samples or bytes")


def check_file_size(place: Place, file: Shard | IndexFile, what: str) -> None:
    """Refuses a file that was not copied completely.

    Args:
        what: the file in words.
    Raises:
        DataError: it is missing, or its size differs from the manifest.
    """
    where = place.where(file.name)
    try:
        size = place.size(file.name)
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        raise error_of(error)(
            f"the {what} cannot be read: {error.strerror} ({where}); the manifest says {file.bytes} bytes; copy it "
            "again, or build again"
        ) from error
    else:
        if size == file.bytes:
            return
        problem = f"has size {size}"
    raise DataError(
        f"the {what} {problem} ({where}); the manifest says {file.bytes} bytes; copy it again, or build again"
    )


def error_of(error: OSError) -> type[DataError]:
    """The kind of error for what could not be read: a server that does not answer may do so at another start."""
    if isinstance(error, WrongContent):
        return WrongShardError
    return StallError if isinstance(error, NotReadable) else DataError
