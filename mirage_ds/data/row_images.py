"""The images of a row: paths, file:// URLs, data: URLs, or the bytes of a file, in base64 where JSON has them."""

import base64
import binascii
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mirage_ds.errors import DataError, reason_of

_ALLOWED = (
    "a path, a file:// URL, a data: URL, an object with the file's `bytes` (in JSON: as base64) or its `path`, or a "
    "list of these"
)


def read_images(value: Any, name: str, where: str, folder: Path) -> tuple[bytes, ...]:
    """The bytes of the image files that a row's field has; none if it is None.

    Args:
        name: of the field, for messages.
        folder: where relative paths begin.

    Raises:
        DataError: a value of another form, or a file that cannot be read.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_read_image(each, name, where, folder) for each in values)


def _read_image(value: Any, name: str, where: str, folder: Path) -> bytes:
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path") is not None):
        value = value["path"] if value.get("bytes") is None else _from_base64(value["bytes"], name, where)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}: {value!r:.80} is not a path ({where}); expected {_ALLOWED}; fix the field")
    if value.startswith("data:"):
        return _from_data_url(value, name, where)
    if value.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        raise DataError(
            f"{name}: {value!r:.80} is on a server ({where}); images are not downloaded; expected {_ALLOWED}; save the "
            "file and give its path"
        )
    return _from_file(value, name, where, folder)


def _from_file(path: str, name: str, where: str, folder: Path) -> bytes:
    try:
        return (folder / (_path_of_url(path, name, where) if path.startswith("file:") else path)).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} cannot be read: {path!r:.80}: {reason_of(error)} ({where}); paths are relative to the folder of "
            f"the file of rows, {folder}; put the image there or fix the path"
        ) from error


def _path_of_url(url: str, name: str, where: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise DataError(
            f"{name}: {url!r:.80} is not a file of this machine ({where}); allowed: file:///PATH; write the path, "
            "or copy the file here"
        )
    return unquote(parts.path)


def _from_data_url(url: str, name: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise DataError(
            f"{name}: {url!r:.80} has no data ({where}); expected data:image/png;base64,DATA; write the image whole"
        )
    return _from_base64(unquote(data), name, where) if head.endswith(";base64") else unquote_to_bytes(data)


def _from_base64(data: Any, name: str, where: str) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(
            f"{name}: {data!r:.80} is not base64: {error} ({where}); expected the bytes of an image file in base64; "
            "encode them again"
        ) from error
