"""A folder of shards: tar files, manifest.json and index.jsonl. Reads them; data_tools writes them. Needs no torch.

manifest.json: what the folder holds, shard by shard, with sha256. Its own sha256, the digest, names the data set.
index.jsonl:   one line per sample with its place in the shards and facts that hold for every model.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError, name_full_disk, name_unwritable

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


def read_range(path: Path, offset: int, size: int, where: str) -> bytes:
    """The bytes of one sample in a shard, headers and padding included.

    Raises:
        DataError: the shard cannot be read or is too short; it names `where`.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"cannot read the shard: {error.strerror} ({where}); put {path} back in its place") from error
    if len(data) != size:
        raise DataError(
            f"{len(data)} of {size} bytes from byte {offset} ({where}); the index wants them all; the shard changed "
            "after the start: copy it again, or build again"
        )
    return data


def parse_members(data: bytes, key: str, where: str) -> dict[str, bytes]:
    """The members of one sample, {"json": ..., "input_0.png": ...}, from its range of a tar file.

    As plain bytes: webdataset's decoders unpickle, which would run code from a data set.

    Raises:
        DataError: the range holds anything but regular files of this key, one after the other to its end.
    """
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                stem, _, name = info.name.partition(".")
                if not info.isreg() or stem != key or name in members:
                    raise tarfile.TarError(f"unexpected member {info.name}")
                # A regular member always has a stream.
                members[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
            # tarfile takes a damaged header behind a good member for the end.
            if tar.offset != len(data):
                raise tarfile.TarError(f"damaged header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DataError(
            f"damaged shard: {error} ({where}); the range holds the members of this key alone; copy the shard again, "
            "or build again"
        ) from error
    return members


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that takes its place at the end: all of it is there, or nothing.

    Raises:
        DataError: `output` is there and not an empty folder.
        DiskFullError: there is no room for it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"the output is there already ({output}); allowed is a new or an empty folder; name another or remove it"
        )
    temporary = output.absolute().parent / f".{output.name}.{os.getpid()}.tmp"
    with name_unwritable(output, "name another"):
        temporary.mkdir(parents=True)
    remedy = f"nothing of {output.name} was kept; free some space, or write it to another disk"
    try:
        with name_full_disk(temporary.parent, remedy):
            yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise
