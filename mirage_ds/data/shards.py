"""Reads a folder of shards: tar files and manifest.json, which data_tools writes. Needs no torch.

manifest.json lists the shards and the files of the index with their sha256. Its own sha256, the digest, identifies the
data set. Where `mirage-data upgrade` wrote it, the digest stays that of the manifest before: it is the same data set.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError

FORMAT_VERSION = 2  # that is written; 1 is read too
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str


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

    path: Path
    manifest: Manifest
    digest: str  # sha256 of manifest.json, or of the one that was upgraded

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples


def load_manifest(folder: Path) -> ShardFolder:
    """Reads manifest.json and checks that all shards and the index exist with their full size.

    Raises:
        DataError: there is no manifest, or it has another version, or a file is missing or of another size.
    """
    shards = read_manifest(folder)
    for shard in shards.manifest.shards:
        check_file_size(folder, shard, "shard")
    if shards.manifest.format_version > 1:
        for file in shards.manifest.index:
            check_file_size(folder, file, "index file")
    return shards


def read_manifest(folder: Path) -> ShardFolder:
    """Reads manifest.json alone.

    Raises:
        DataError: there is no manifest, or it is damaged or has another version.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no {MANIFEST_NAME}: {error.strerror} ({path}); expected a folder that `mirage-data build` wrote; name "
            "such a folder, or build one"
        ) from error
    manifest = _parse_manifest(data, path)
    return ShardFolder(folder, manifest, manifest.upgraded_from or hashlib.sha256(data).hexdigest())


def _parse_manifest(data: bytes, path: Path) -> Manifest:
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


def check_file_size(folder: Path, file: Shard | IndexFile, what: str) -> None:
    """Refuses a file that was not copied completely.

    Args:
        what: the file in words.
    Raises:
        DataError: it is missing, or its size differs from the manifest.
    """
    path = folder / file.name
    try:
        size = path.stat().st_size
        problem = f"has size {size}"
    except OSError as error:
        size, problem = (
            None,
            "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}",
        )
    if size != file.bytes:
        raise DataError(
            f"the {what} {problem} ({path}); the manifest says {file.bytes} bytes; copy it again, or build again"
        )
