"""Decodes the bytes of an image file to RGB, safely: known formats, limited sizes. Needs no torch.

Pixels are those that a viewer shows: turned as EXIF says, 16 bits scaled to 8, transparent pixels white. Of an animated
file it is the first frame; CMYK becomes RGB by Pillow's formula, without a color profile.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mirage_ds.errors import DataError


def decode(data: bytes, where: str, *, exif_orientation: bool = True) -> Image.Image:
    """Decodes to RGB; transparent pixels become white, as in the reference.

    Args:
        exif_orientation: turn the image as its EXIF orientation says.

    Raises:
        DataError: see `open_image`.
    """
    image = open_image(data, where, exif_orientation=exif_orientation)
    with _name_damage(where):
        if image.mode.startswith("I"):
            return _from_16_bits(image).convert("RGB")
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB of RGB
MAX_ASPECT_RATIO = 200  # the image processor refuses more


def _from_16_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, as of depth maps, with its upper 8 bits; Pillow's own conversion cuts off above 255."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def open_image(data: bytes, where: str, *, exif_orientation: bool = True) -> Image.Image:
    """Decodes all pixels of an image, so that nothing can fail later, and turns it as its EXIF orientation says.

    Raises:
        DataError: not one of IMAGE_FORMATS, damaged, too large or too narrow; the message names `where`.
    """
    with _name_damage(where):
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _check_size(*image.size, where)
        image.load()
    return _turned(image) if exif_orientation else image


def check_header(data: bytes, where: str) -> str:
    """The format of an image, one of IMAGE_FORMATS, by its header; no pixel is decoded.

    Raises:
        DataError: not one of IMAGE_FORMATS, too large or too narrow; the message names `where`.
    """
    with _name_damage(where):
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _check_size(*image.size, where)
    return str(image.format)


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image that `open_image` accepts, before EXIF's turn; no pixel is decoded."""
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation: what makes the image upright


def _turned(image: Image.Image) -> Image.Image:
    """Not by PIL.ImageOps.exif_transpose, which also writes EXIF again and fails where other tags are damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        return image  # EXIF that cannot be read: as it is stored, as viewers show it
    method = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


@contextmanager
def _name_damage(where: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:  # its text has an address in memory, another one each time
        raise _not_decoded("not an image of a known format", where) from error
    # The errors of Pillow's decoders on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise _not_decoded(str(error), where) from error


def _not_decoded(reason: str, where: str) -> DataError:
    return DataError(
        f"the image cannot be decoded: {reason} ({where}); allowed: {', '.join(IMAGE_FORMATS)} of at most "
        f"{MAX_IMAGE_PIXELS} pixels; replace the image"
    )


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(
            f"the image has {width} x {height} pixels ({where}); allowed: at most {MAX_IMAGE_PIXELS} pixels and an "
            f"aspect ratio of at most {MAX_ASPECT_RATIO} : 1; scale or crop the image"
        )
