"""Writes files of a checkpoint; size and sha256 are taken from the bytes as they pass, and nothing is read back.

Used by the rank itself, and by its writer process: see writer.py.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from mirage_ds.checkpoint.complete import describe_file

CHUNK_BYTES = 2**20  # hashed and then written while it is in the processor's cache


class Written(NamedTuple):
    """What became of one rank's files."""

    files: dict[str, dict[str, Any]]
    """Their entries in files.json."""
    error: str | None
    """Why a file could not be written, with its name."""


class HashedFile:
    """What torch.save needs of a file; counts and hashes what it writes.

    Keeps an error instead of raising it: torch's C++ writer may turn it into another one without the system's words.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.num_bytes, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview | bytes) -> int:
        view = memoryview(data)
        if self.error is None:
            try:
                self._write(view)
            except OSError as error:
                self.error = error
        return len(view)

    def _write(self, view: memoryview) -> None:
        for begin in range(0, len(view), CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            self.digest.update(chunk)
            self.file.write(chunk)
        self.num_bytes += len(view)

    def flush(self) -> None:
        """Nothing: `store` flushes."""

    def store(self) -> dict[str, Any]:
        """Flushes the file to disk; returns its entry in files.json.

        Raises:
            OSError: it could not be stored.
        """
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest()}


def write_states(folder: Path, states: Iterable[tuple[str, Any]], *, read_back: bool) -> Written:
    """Writes each state to its file in `folder`, up to the first error, which is kept: the other ranks must know it."""
    files: dict[str, dict[str, Any]] = {}
    for name, state in states:
        try:
            files[name] = write_state(folder / name, state, read_back=read_back)
        except OSError as error:
            return Written(files, f"{name}: {error}")
    return Written(files, None)


def write_state(file: Path, state: Any, *, read_back: bool) -> dict[str, Any]:
    """Writes what torch.load reads, flushes it to disk, and returns its entry in files.json.

    Args:
        read_back: read it from the disk again, and compare.

    Raises:
        OSError: the file could not be stored, or what was read back differs.
    """
    with file.open("wb") as opened:
        hashed = HashedFile(opened)
        torch.save(state, hashed)  # type: ignore[arg-type]  # of a file it uses write and flush alone
        entry = hashed.store()
        if read_back:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
    if read_back and describe_file(file) != entry:
        raise OSError("what was read back differs from what was written")
    return entry
