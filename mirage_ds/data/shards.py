"""A folder of shards: tar files and manifest.json. Reads them; data_tools writes them. Needs no torch.

manifest.json says what the folder holds, shard by shard, with sha256. Its own sha256, the digest, names the data set.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    format_version: int
    num_samples: int
    index_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class ShardFolder:
    """A folder whose manifest was read."""

    path: Path
    manifest: Manifest
    digest: str  # sha256 of manifest.json

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples


def load_manifest(folder: Path) -> ShardFolder:
    """Reads manifest.json and checks that the shards are there, in their full size.

    Raises:
        DataError: no manifest, one of another version, a shard that is missing or of another size.
    """
    shards = read_manifest(folder)
    for shard in shards.manifest.shards:
        check_shard_size(folder, shard)
    return shards


def read_manifest(folder: Path) -> ShardFolder:
    """Reads manifest.json and looks at nothing else.

    Raises:
        DataError: no manifest, a damaged one or one of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no {MANIFEST_NAME}: {error.strerror} ({path}); a data folder is what `mirage-data build` wrote; name "
            "such a folder or build one"
        ) from error
    return ShardFolder(folder, _parse_manifest(data, path), hashlib.sha256(data).hexdigest())


def _parse_manifest(data: bytes, path: Path) -> Manifest:
    try:
        fields: dict[str, Any] = json.loads(data)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"format version {version!r} ({path}); this version reads {FORMAT_VERSION}; build the shards again"
            )
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        manifest = Manifest(**fields, shards=shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"damaged manifest: {error!r} ({path}); allowed is what `mirage-data build` writes; build the shards again"
        ) from error
    if manifest.num_samples < 1 or sum(shard.samples for shard in shards) != manifest.num_samples:
        raise DataError(
            f"{manifest.num_samples} samples in all do not fit the shards' counts ({path}); they must add up, to 1 or "
            "more; build the shards again"
        )
    return manifest


def check_shard_size(folder: Path, shard: Shard) -> None:
    """Refuses a shard that was not copied whole.

    Raises:
        DataError: it is missing or of another size than the manifest says.
    """
    path = folder / shard.name
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if found != f"{shard.bytes} bytes":
        raise DataError(
            f"the shard is {found} ({path}); the manifest says {shard.bytes} bytes; copy it again, or build again"
        )
