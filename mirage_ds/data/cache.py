"""Keeps on this node what was read from a server: all ranks and workers of a node share the folder. Needs no torch.

SHA256.file    a whole file, such as a part of the index
SHA256.shard   a sparse file of the shard's size, in which ranges that were read stand at their places; behind it one
               record per range: offset, size and crc32

Names are contents, so a folder of shards that is built again never meets older bytes. Every range is compared with its
crc32 when it is read, and the whole shard with its sha256 once all its samples are there. Files may disappear at any
moment, as any process removes the least recently used ones beyond the limit: what is not there is read again.
"""

import errno
import fcntl
import hashlib
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mirage_ds.data.shard import Shard
from mirage_ds.errors import DataError, name_full_disk, name_unwritable, reason_of

GIB = 2**30
RECORD = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32", "<u8")])
LOOK_AFTER = 1 / 1000  # of the limit: so many bytes a process adds before it looks for files to remove
REMEDY = "free some space, or set data.cache_dir to a folder on a disk of this machine where you may write"
OWN_NAME = re.compile(r"[0-9a-f]{64}\.(shard|file|part)")  # what else lies in the folder is not the cache's
FILLED = 0.95  # of the limit: what is left after removing
ENDS_KEEPING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # the disk will not take the next range either
FILES_STAY_S = 3600  # so long whole files stay after their last use: a process may be about to open them


class WrongContent(OSError):
    """What a server sent is not what the manifest says."""


def own_folder() -> Path:
    """The default: a folder of this user among the temporary ones."""
    return Path(tempfile.gettempdir()) / f"mirage_ds-cache-{os.getuid()}"


class Cache:
    """A folder on a disk of this node.

    Raises:
        DataError: it cannot be made, or the default one belongs to another user.
        DiskFullError: its disk is full.
    """

    def __init__(self, folder: Path | None, limit_gib: float) -> None:
        self._folder, self._limit = folder or own_folder(), int(limit_gib * GIB)
        self._added = self._limit  # since this process has looked for files to remove: it looks at its first one
        self._is_full = False
        with self._names_faults():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder is None and self._folder.stat().st_uid != os.getuid():
            raise DataError(
                f"the folder for what is read from servers belongs to another user ({self._folder}); allowed: a folder "
                f"of your own; {REMEDY}"
            )

    def read_range(self, shard: Shard, offset: int, size: int) -> bytes | None:
        """The bytes, or None if they are not here, or damaged."""
        try:
            with self._path(shard.sha256, "shard").open("rb", buffering=0) as file:
                records = _records(file.fileno(), shard)
                found = records[(records["offset"] == offset) & (records["size"] == size)]
                if not len(found):
                    return None
                data = os.pread(file.fileno(), size, offset)
                os.utime(file.fileno())
        except OSError:  # also where the disk fails: the server has the bytes
            return None
        return data if zlib.crc32(data) == found["crc32"][0] else None

    def keep_range(self, shard: Shard, offset: int, data: bytes) -> None:
        """Keeps bytes of a shard. A write that fails is said; from a disk's refusal on it keeps nothing more.

        Raises:
            WrongContent: all samples of the shard are here now, and its sha256 is another one; nothing of it is kept.
        """
        if self._is_full:
            return
        path = self._path(shard.sha256, "shard")
        try:
            try:
                found = self._write(path, shard, offset, data)
            except FileNotFoundError:  # another process has removed the file, or someone the folder
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                found = self._write(path, shard, offset, data)
        except OSError as error:
            self._is_full = error.errno in ENDS_KEEPING
            what = "from now on samples are" if self._is_full else "this sample is"
            print(
                f"WARNING: what is read from servers is not kept ({self._folder}): {reason_of(error)}; {what} read "
                f"from the server each time; {REMEDY}",
                file=sys.stderr,
                flush=True,
            )
            return
        if found != shard.sha256:
            path.unlink(missing_ok=True)
        if found not in (shard.sha256, None):  # None: damaged on this disk
            raise WrongContent(0, f"all of its samples were read, and it has sha256 {found}, not {shard.sha256}")

    def _write(self, path: Path, shard: Shard, offset: int, data: bytes) -> str | None:
        """Writes a range; returns the sha256 of a shard that it completes, None if what is here is damaged."""
        self._make_room(len(data))
        with self._opened(path, shard) as file:
            os.pwrite(file, data, offset)
            records, is_new = _add_record(file, shard, offset, data)
            return _sha256(file, shard, records) if is_new and len(records) == shard.samples else shard.sha256

    def file(self, sha256: str, fetch: Callable[[], Iterable[bytes]]) -> Path:
        """A whole file with this sha256; one process of the node fetches it, while the others wait.

        Args:
            fetch: gives the file in pieces.

        Raises:
            WrongContent: what was fetched has another sha256; also what `fetch` raises.
            DataError, DiskFullError: the disk cannot be written; an index is memory-mapped, so it has to lie there.
        """
        path = self._path(sha256, "file")
        while not _is_intact(path, sha256):
            with ExitStack() as stack:
                with self._names_faults():
                    part = stack.enter_context(path.with_suffix(".part").open("ab", buffering=0))
                fcntl.flock(part, fcntl.LOCK_EX)
                # Another process may have completed it while this one waited.
                if _is_at(part.fileno(), part.name) and not _is_intact(path, sha256):
                    part.truncate(0)
                    for piece in fetch():
                        self._make_room(len(piece))
                        with self._names_faults():
                            part.write(piece)
                    found = _sha256_of(Path(part.name))
                    if found != sha256:
                        os.unlink(part.name)
                        raise WrongContent(0, f"it has sha256 {found}, not {sha256}")
                    os.rename(part.name, path)
        os.utime(path)
        return path

    def _path(self, sha256: str, kind: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError(
                f"damaged manifest: {sha256!r:.80} is no sha256 (for a file in {self._folder}); expected "
                "what `mirage-data build` writes; build the shards again"
            )
        return self._folder / f"{sha256}.{kind}"

    @contextmanager
    def _names_faults(self) -> Iterator[None]:
        with name_full_disk(self._folder, REMEDY), name_unwritable(self._folder, REMEDY):
            yield

    @contextmanager
    def _opened(self, path: Path, shard: Shard) -> Iterator[int]:
        """The file that a shard's ranges go to, for this process alone."""
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".new") as new:
                new.truncate(shard.bytes)
                with suppress(FileExistsError):  # another process was first
                    os.link(new.name, path)
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_size < shard.bytes:  # was cut off: no record is left
                os.ftruncate(file, shard.bytes)
            yield file
        finally:
            os.close(file)

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files beyond the limit, now and then."""
        self._added += size
        if self._added < self._limit * LOOK_AFTER:
            return
        self._added = 0
        found = []
        for entry in os.scandir(self._folder):
            if not OWN_NAME.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):  # another process has removed it
                facts = entry.stat()
                found.append((facts.st_mtime_ns, facts.st_blocks * 512, entry.path))
        total = sum(used for _, used, _ in found) + size
        if total <= self._limit:
            return
        for used_ns, used, path in sorted(found):
            if total <= self._limit * FILLED:
                return
            if not path.endswith(".shard") and used_ns > (time.time() - FILES_STAY_S) * 1e9:
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= used


def _is_at(file: int, path: str) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _is_intact(path: Path, sha256: str) -> bool:
    try:
        return _sha256_of(path) == sha256
    except OSError:
        return False


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(file: int, shard: Shard) -> npt.NDArray[np.void]:
    """The records behind the shard's bytes; a last one that was cut off does not count."""
    data = os.pread(file, max(0, os.fstat(file).st_size - shard.bytes), shard.bytes)
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)


def _add_record(file: int, shard: Shard, offset: int, data: bytes) -> tuple[npt.NDArray[np.void], bool]:
    """Writes the record of a range, in place of an earlier one; returns all records, and whether there was none."""
    records = _records(file, shard)
    earlier = np.flatnonzero(records["offset"] == offset)
    number = int(earlier[0]) if len(earlier) else len(records)
    record = np.array([(offset, len(data), zlib.crc32(data))], dtype=RECORD)
    os.pwrite(file, record.tobytes(), shard.bytes + number * RECORD.itemsize)
    return np.concatenate([records[:number], record, records[number + 1 :]]), not len(earlier)


def _sha256(file: int, shard: Shard, records: npt.NDArray[np.void]) -> str | None:
    """Of a shard whose samples are all here; None if what is here is damaged.

    What follows the last sample is the end of a tar file: zeros.
    """
    digest, end = hashlib.sha256(), 0
    for offset, size, crc32 in np.sort(records, order="offset").tolist():
        if offset != end or not 0 < size <= shard.bytes - end:
            return None
        data = os.pread(file, size, offset)
        if zlib.crc32(data) != crc32:
            return None
        digest.update(data)
        end += size
    digest.update(bytes(shard.bytes - end))
    return digest.hexdigest()
