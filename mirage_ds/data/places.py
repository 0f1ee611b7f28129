"""Where a folder of shards lies: on a disk of this machine, or on a server. Needs no torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mirage_ds.config import DataConfig
from mirage_ds.data.cache import Cache
from mirage_ds.data.remote import PIECE_BYTES, RemotePlace
from mirage_ds.data.shard import Shard
from mirage_ds.paths import Location

T = TypeVar("T")


class LocalPlace:
    """A folder on a disk of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.folder.resolve().name

    def where(self, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.folder / name)

    def read_all(self, name: str) -> bytes:
        """A file.

        Raises:
            OSError: it does not exist, or cannot be read.
        """
        return (self.folder / name).read_bytes()

    def read_range(self, shard: Shard, offset: int, size: int, *, again: bool = False) -> bytes:
        """Bytes of a shard: less than `size` at the end of the file.

        Raises:
            OSError: it cannot be read.
        """
        with (self.folder / shard.name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file, piece by piece.

        Raises:
            OSError: it does not exist, or cannot be read.
        """
        with (self.folder / name).open("rb", buffering=0) as file:
            yield from iter(lambda: file.read(PIECE_BYTES), b"")

    def file(self, name: str, sha256: str) -> Path:
        """A file as it lies there; its contents are not compared."""
        return self.folder / name

    def checked(self, files: Sequence[T]) -> Sequence[T]:
        """Those whose sizes are compared at the start of a run: all."""
        return files

    def size(self, name: str) -> int:
        """Of a file, in bytes.

        Raises:
            OSError: it does not exist, or cannot be seen.
        """
        return (self.folder / name).stat().st_size


Place = LocalPlace | RemotePlace


@dataclass(frozen=True)
class Reading:
    """How a server is read; a disk needs none of it."""

    cache_dir: Path | None = None
    cache_gib: float = DataConfig.model_fields["cache_gib"].default
    timeout_s: float = DataConfig.model_fields["read_timeout_s"].default

    @classmethod
    def of(cls, config: DataConfig) -> "Reading":
        return cls(config.cache_dir, config.cache_gib, config.read_timeout_s)


DEFAULT = Reading()


def open_place(location: Location, reading: Reading = DEFAULT) -> Place:
    """The place that a recipe or a command names.

    Raises:
        DataError: what is read from a server could not be kept on this machine.
    """
    if isinstance(location, Path):
        return LocalPlace(location)
    return RemotePlace(location, Cache(reading.cache_dir, reading.cache_gib), reading.timeout_s)
