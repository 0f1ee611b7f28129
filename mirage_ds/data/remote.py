"""A folder of shards behind a URL: S3, GCS, the hub, HTTP, whatever fsspec knows. Needs no torch.

A read has a time limit and several tries. What came is kept on this node (cache.py). Credentials in the URL are in no
message.
"""

import errno
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from mirage_ds.data.cache import Cache, WrongContent
from mirage_ds.data.shard import Shard
from mirage_ds.data.spread import spread
from mirage_ds.errors import DataError, MirageError
from mirage_ds.paths import without_secrets

T = TypeVar("T")
TRIES = 6
FIRST_WAIT_S = 1.0  # before the second try; each later wait is twice the one before: 31 s in all
MAX_STALLS_IN_ROW = 3  # samples that a server does not give, with all tries; then it is the server
PIECE_BYTES = 16 * 2**20  # of a whole file
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")  # of S3's, Google's
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
SIZES_CHECKED = 4  # shards of a folder: each is a request
TAR_BLOCK_BYTES = 512
REFUSALS = (401, 403)  # of HTTP
# Each filesystem has errors of its own, whose classes are there only with its package. These are a program's faults.
PROGRAMMING = (TypeError, AttributeError, NameError, KeyError, AssertionError)

# An open connection does not survive a fork, so each process has its own.
_filesystems: dict[tuple[int, str], tuple[Any, str]] = {}
_drawn = random.SystemRandom()  # the same in no two processes, and no part of a run's random state


class NotReadable(OSError):
    """A server that does not answer, or not with what was asked for, after all tries."""


class NoAccess(NotReadable):
    """A server that refuses; S3 does so too for a file that does not exist, if the folder may not be listed."""


class RemotePlace:
    """A folder on a server."""

    def __init__(self, url: str, cache: Cache, timeout_s: float) -> None:
        self._url, self._cache, self._timeout_s = url, cache, timeout_s
        self._wrong: set[Shard] = set()  # that have come with another sha256 once

    def __str__(self) -> str:
        return without_secrets(self._url)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rstrip("/").rpartition("/")[2]

    def where(self, name: str) -> str:
        """The URL of a file, for messages."""
        return without_secrets(_join(self._url, name, self._url))

    def read_all(self, name: str) -> bytes:
        """A small file, from the server each time.

        Raises:
            OSError: it does not exist, or cannot be read.
        """
        data: bytes = self._try(name, lambda filesystem, path: filesystem.cat_file(path))
        return data

    def read_range(self, shard: Shard, offset: int, size: int, *, again: bool = False) -> bytes:
        """Bytes of a shard, from this node if they are here.

        Args:
            again: from the server in any case, as what came before cannot be used.

        Raises:
            OSError: they cannot be read.
            WrongContent: the shard, complete with them, has another sha256 for the second time.
        """
        data = None if again else self._cache.read_range(shard, offset, size)
        if data is None:
            data = self._fetch(shard.name, offset, size)
            try:
                self._cache.keep_range(shard, offset, data)
            except WrongContent as error:  # any of its ranges may be the damaged one, and nothing of it is kept now
                if shard in self._wrong:
                    raise
                self._wrong.add(shard)
                print(
                    f"WARNING: {self.where(shard.name)}: {error.strerror}; samples of it that were read before may "
                    "have been wrong; it is read again, and the run ends if that happens again",
                    file=sys.stderr,
                    flush=True,
                )
                return self.read_range(shard, offset, size, again=True)
        return data

    def file(self, name: str, sha256: str) -> Path:
        """A whole file, as a file of this node.

        Raises:
            OSError: it cannot be read, or has another sha256.
        """
        try:
            return self._cache.file(sha256, lambda: self.pieces(name))
        except WrongContent:  # which may be on the way only
            return self._cache.file(sha256, lambda: self.pieces(name))

    def checked(self, files: Sequence[T]) -> Sequence[T]:
        """Those whose sizes are worth requests at the start of a run: some, evenly spread."""
        return [files[number] for number in spread(len(files), SIZES_CHECKED)]

    def size(self, name: str) -> int:
        """Of a file, in bytes.

        Raises:
            OSError: it does not exist, or the server cannot be reached.
            DataError: the server gives no ranges of bytes, or no sizes.
        """
        size = self._try(name, lambda filesystem, path: filesystem.info(path)).get("size")
        if not isinstance(size, int):
            raise DataError(
                f"the server does not say how large a file is ({self.where(name)}); it is compared with the manifest; "
                "use a server that sends Content-Length, or copy the shards to a disk"
            )
        self._fetch(name, 0, min(size, TAR_BLOCK_BYTES))
        return size

    def pieces(self, name: str) -> Iterator[bytes]:
        """A file from the server, piece by piece; raises as `size`, and OSError."""
        size = self.size(name)
        for offset in range(0, size, PIECE_BYTES):
            yield self._fetch(name, offset, min(PIECE_BYTES, size - offset))

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        def fault_of(data: bytes) -> str:
            return "" if len(data) >= size else f"only {len(data)} of {size} bytes from byte {offset} came"

        data: bytes = self._try(
            name, lambda filesystem, path: filesystem.cat_file(path, start=offset, end=offset + size), fault_of
        )
        if len(data) > size:
            raise DataError(
                f"the server sends a whole file instead of a range of bytes ({self.where(name)}); samples are read "
                "by ranges, which S3 and most web servers give; use such a server, or copy the shards to a disk"
            )
        return data

    def _try(self, name: str, call: Callable[[Any, str], Any], fault_of: Callable[[Any], str] = lambda _: "") -> Any:
        """What a call of the filesystem gives; it is tried several times.

        Args:
            call: with the filesystem and the file's path there; nothing but the filesystem's own code, as whatever that
                raises is a fault of the server.
            fault_of: why what it gave cannot be used, so that it is tried again; nothing if it can.
        Raises:
            OSError: the server says that there is no such file or no access, or all tries failed.
        """
        for number in count(1):
            try:
                answer = within(self._timeout_s, lambda: call(*self._opened(name)))
            except (MirageError, *PROGRAMMING):
                raise
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "the server has no such file (404)") from None
            except Exception as error:  # noqa: BLE001  # see PROGRAMMING
                reason = _said(error)
                refused = isinstance(error, PermissionError) or getattr(error, "status", 0) in REFUSALS
                if refused or type(error).__name__ in NO_CREDENTIALS:
                    raise NoAccess(0, reason) from None
            else:
                reason = fault_of(answer)
                if not reason:
                    return answer
            _filesystems.pop((os.getpid(), self._url), None)  # the next try has a connection of its own
            if number == TRIES:
                raise NotReadable(0, f"{reason}, after {TRIES} tries")
            wait_s = FIRST_WAIT_S * 2 ** (number - 1) * _drawn.uniform(0.5, 1)
            print(
                f"WARNING: try {number} of {TRIES} to read {self.where(name)} failed: {reason}; the next is in "
                f"{wait_s:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait_s)
        raise AssertionError("unreachable: the last try returns or raises")

    def _opened(self, name: str) -> tuple[Any, str]:
        """The filesystem, and the path of a file there.

        Raises:
            DataError: its package is not installed, or there is no such kind of URL.
        """
        key = (os.getpid(), self._url)
        if key not in _filesystems:
            _filesystems[key] = connect(self._url)
        filesystem, root = _filesystems[key]
        return filesystem, _join(root, name, self._url)


def longest_wait_s(timeout_s: float) -> float:
    """For the last of the samples after which a run ends, if each try takes as long as it may."""
    return MAX_STALLS_IN_ROW * (TRIES * timeout_s + FIRST_WAIT_S * (2 ** (TRIES - 1) - 1))


def connect(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the folder's path there.

    Raises:
        DataError: its package is not installed, or there is no such kind of URL.
    """
    # Imported here: most runs read shards on a disk.
    from fsspec.core import url_to_fs

    scheme, shown = url.partition("://")[0], without_secrets(url)
    try:
        return url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise DataError(
            f"{scheme}:// cannot be read ({shown}): {error}; fsspec needs a package of its own for each kind of URL; "
            f"install it on every machine of the run: pip install {PACKAGES.get(scheme, 'PACKAGE')}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{scheme}:// cannot be read ({shown}): {without_secrets(str(error))}; allowed: a folder, or a URL of "
            "s3, gs, hf, http, https, and others of fsspec; correct it"
        ) from error


def within(limit_s: float, action: Callable[[], T]) -> T:
    """What `action` gives, in a thread that is left alone if it takes longer.

    A filesystem's own limits differ, and do not cover all that it waits for.

    Raises:
        NotReadable: it takes longer; also what `action` raises.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((action(), None))
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            results.put((None, error))

    threading.Thread(target=run, daemon=True, name="read from a server").start()
    try:
        result, error = results.get(timeout=limit_s)
    except queue.Empty:
        raise NotReadable(0, f"no complete answer within {limit_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _said(error: BaseException) -> str:
    """Its own words; of an error that is not the system's with its class, as the words may say little."""
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{without_secrets(words):.200}"


def _join(folder: str, name: str, url: str) -> str:
    """A file's path; of a web server the query, such as a signature, stays at the end."""
    mark = "?" if url.startswith(("http://", "https://")) else "\0"
    path, found, query = folder.partition(mark)
    return f"{path.rstrip('/')}/{name}{found}{query}"
