"""A folder of shards: tar files, manifest.json and index.jsonl. Reads them; data_tools writes them. Needs no torch.

manifest.json: what the folder holds, shard by shard, with sha256. Its own sha256, the digest, names the data set.
index.jsonl:   one line per sample with its place in the shards and facts that hold for every model.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.jsonl"


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


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One sample: its members are bytes [offset, offset + size) of a shard, headers and padding included."""

    key: str
    shard: int  # number in Manifest.shards
    offset: int
    size: int
    input_sizes: list[tuple[int, int]]  # width, height of each input image, as in the user's file
    helper_sizes: list[tuple[int, int]]
    question_chars: int
    answer_chars: int
    image_blocks: int  # in the question
    latent_blocks: int  # in the answer


@dataclass(frozen=True)
class ShardFolder:
    """A folder whose manifest was read and whose shards are all there, in their full size."""

    path: Path
    manifest: Manifest
    digest: str  # sha256 of manifest.json

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples


def load_manifest(folder: Path) -> ShardFolder:
    """Reads manifest.json and checks that the shards are there.

    Raises:
        DataError: no manifest, one of another version, a shard that is missing or of another size.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no {MANIFEST_NAME}: {error.strerror} ({path}); a data folder is what `mirage-data build` wrote; name "
            "such a folder or build one"
        ) from error
    manifest = _parse_manifest(data, path)
    for shard in manifest.shards:
        _check_shard(folder / shard.name, shard)
    return ShardFolder(folder, manifest, hashlib.sha256(data).hexdigest())


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


def _check_shard(path: Path, shard: Shard) -> None:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if found != f"{shard.bytes} bytes":
        raise DataError(
            f"the shard is {found} ({path}); the manifest says {shard.bytes} bytes; copy it again, or build again"
        )


def load_index(folder: ShardFolder) -> list[IndexEntry]:
    """Reads index.jsonl: one entry per sample, in the order of their keys.

    Raises:
        DataError: it is missing, or is not the one that the manifest names.
    """
    path = folder.path / INDEX_NAME
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != folder.manifest.index_sha256:
        raise DataError(
            f"{INDEX_NAME} is missing or is not the one that the manifest names ({path}); both come from one build; "
            "copy it again, or build again"
        )
    # The digest vouches for the contents.
    return [IndexEntry(**json.loads(line)) for line in data.splitlines()]


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that takes its place at the end: all of it is there, or nothing.

    Raises:
        DataError: `output` is there and not an empty folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"the output is there already ({output}); allowed is a new or an empty folder; name another or remove it"
        )
    temporary = output.absolute().parent / f".{output.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise
