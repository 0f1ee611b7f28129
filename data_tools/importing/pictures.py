"""Reads the images of rows, and cuts out the parts that boxes give."""

import io
import os
import stat
from collections.abc import Mapping
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from PIL import Image

from data_tools.importing.source_rows import Box, LeftOutError, Picture, SourceRow
from mirage_ds.data.images import check_header, decode, header_size
from mirage_ds.data.row_images import read_images

TINY_PX = 28  # the side of what becomes a token of Qwen2.5-VL: less is enlarged
_MAX_FILE_BYTES = 2**28  # as of an element of a JSON list


class ImageFile(NamedTuple):
    data: bytes
    suffix: str  # of a file with it, without the dot
    is_tiny_part: bool  # cut out, and narrower or lower than TINY_PX


def read_picture(picture: Picture, name: str, source: SourceRow) -> ImageFile:
    """An image as the file that it is; a part of one as a PNG file.

    Args:
        name: of the field of our row, for messages.

    Raises:
        DataError: it cannot be read, is no image, or has another size than it must have; or nothing of it is in the
            box.
    """
    _check_file(picture.value, name, source)
    (data,) = read_images([picture.value], name, source.where, source.folder)
    where = f"{source.where}, {name}"
    is_tiny_part = False
    if picture.box is not None:
        data = _cut(picture, picture.box, decode(data, where))
        is_tiny_part = min(header_size(data)) < TINY_PX
    image_format = check_header(data, where)
    return ImageFile(data, {"JPEG": "jpg"}.get(image_format, image_format.lower()), is_tiny_part)


def _check_file(value: Any, name: str, source: SourceRow) -> None:
    """Refuses a path that a row of others must not have: what it names would be copied.

    Raises:
        LeftOutError: a file outside of the folders of the source, no regular file, or a very large one.
    """
    if isinstance(value, Mapping):
        value = None if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, str) or value.startswith("data:"):
        return
    named = unquote(urlsplit(value).path) if value.startswith("file:") else value
    path = os.path.abspath(source.folder / named)  # links stay, as those of a cache of the hub
    if not any(Path(path).is_relative_to(os.path.abspath(folder)) for folder in (source.folder, *source.around)):
        raise LeftOutError(
            f"{name} is outside of the source",
            f"{value!r:.80}; expected a path below {source.folder}; give the folder around both as SOURCE or --images",
        )
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return  # which the reading says
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
        raise LeftOutError(
            f"{name} is no file of an image",
            f"{value!r:.80}; expected a regular file of at most {_MAX_FILE_BYTES} bytes",
        )


def _cut(picture: Picture, box: Box, image: Image.Image) -> bytes:
    if picture.size_px not in (None, image.size):
        raise LeftOutError(
            "the image has another size than the row says",
            f"{image.size} and {picture.size_px}; expected the image that the boxes were drawn on",
        )
    width, height = image.size if picture.box_unit == "sides" else (1, 1)
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    around_x, around_y = picture.margin * (right - left), picture.margin * (bottom - top)
    part = (
        max(floor(left - around_x), 0),
        max(floor(top - around_y), 0),
        min(ceil(right + around_x), image.width),
        min(ceil(bottom + around_y), image.height),
    )
    if left >= image.width or top >= image.height or right <= 0 or bottom <= 0:
        raise LeftOutError("a box is outside of its image", f"{box} in {image.size}; expected a part of the image")
    buffer = io.BytesIO()
    image.crop(part).save(buffer, format="PNG")
    return buffer.getvalue()
