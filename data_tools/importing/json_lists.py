"""The elements of a JSON list, one after the other: memory has to hold one of them, not the file."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mirage_ds.errors import DataError

_CHUNK_BYTES = 2**20
_MAX_ELEMENT_BYTES = 2**28
# A text, complete or up to the end of what was read; or a bracket. All of these are ASCII, which no other character of
# UTF-8 contains.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[{}\[\]]', re.DOTALL)
_DEPTH = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
_NO_SPACE = re.compile(rb"[^ \t\r\n]")


class Element(NamedTuple):
    """An element as its bytes, which were not parsed."""

    line: int  # where it begins, from 1
    content: bytes
    read_bytes: int  # of the file, up to its end


def is_list(path: Path) -> bool:
    """Whether a file begins as a JSON list.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror} ({path}); name an existing file") from error


def elements(path: Path) -> Iterator[Element]:
    """The elements that are objects, in order.

    Raises:
        DataError: the file is no list of objects, ends early, or one takes more than _MAX_ELEMENT_BYTES.
    """
    try:
        with path.open("rb") as file:
            yield from _Reader(file, path).elements()
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror} ({path}); name an existing file") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.buffer, self.place = b"", 0  # what was read, and where in it reading is
        self.before = 0  # bytes of the file before the buffer
        self.line, self.counted = 1, 0  # the line at this place of the buffer

    def elements(self) -> Iterator[Element]:
        self._read_on(len(codecs.BOM_UTF8))
        self.buffer = self.buffer.removeprefix(codecs.BOM_UTF8)
        self._expect(b"[")
        if self._next() == b"]":
            return
        while True:
            yield self._element()
            if self._expect(b",", b"]") == b"]":
                break
        if rest := self._next():
            raise self._wrong(f"{rest!r} after its end")

    def _element(self) -> Element:
        """The object that begins here: all up to the bracket that closes it."""
        if (first := self._next()) != b"{":
            raise self._wrong(f"an element that begins with {first!r}" if first else "its end is missing")
        depth, length = 0, 0  # brackets that are open, and bytes of the element that were looked at
        while True:
            found = _TOKEN.search(self.buffer, self.place + length)
            if found is None or (found[0][:1] == b'"' and not found[1]):
                # A text that may continue is read again from its beginning, with as much again behind it.
                length = (len(self.buffer) if found is None else found.start()) - self.place
                if not self._read_on(len(self.buffer)):
                    raise self._wrong("the end of an element is missing")
                continue
            length = found.end() - self.place
            depth += _DEPTH.get(found[0], 0)
            if depth == 0:
                content = self.buffer[self.place : self.place + length]
                element = Element(self._line(), content, self.before + self.place + length)
                self.place += length
                return element

    def _expect(self, *allowed: bytes) -> bytes:
        found = self._next()
        if found not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise self._wrong(f"{found!r} instead of {expected}" if found else "its end is missing")
        self.place += 1
        return found

    def _next(self) -> bytes:
        """The next byte that is no space, which stays; empty at the end."""
        while True:
            if (found := _NO_SPACE.search(self.buffer, self.place)) is not None:
                self.place = found.start()
                return found[0]
            self.place = len(self.buffer)
            if not self._read_on():
                return b""

    def _read_on(self, num_bytes: int = 0) -> bool:
        """Forgets what lies before the place, and reads on; false at the end of the file."""
        self._line()
        self.before += self.place
        self.buffer, self.place, self.counted = self.buffer[self.place :], 0, 0
        if len(self.buffer) > _MAX_ELEMENT_BYTES:
            raise self._wrong(f"an element of more than {_MAX_ELEMENT_BYTES} bytes, or one that does not end")
        read = self.file.read(max(num_bytes, _CHUNK_BYTES))
        self.buffer += read
        return bool(read)

    def _line(self) -> int:
        """The line of the place, from 1."""
        self.line += self.buffer.count(b"\n", self.counted, self.place)
        self.counted = self.place
        return self.line

    def _wrong(self, what: str) -> DataError:
        return DataError(
            f"not a JSON list of objects: {what} ({self.path}:{self._line()}); allowed: [{{...}}, {{...}}], or one "
            "object per line; write the file again"
        )
