"""Decodes the bytes of an image file to RGB, safely: known formats, limited sizes. Needs no torch."""

import io
import struct

from PIL import Image

from mirage_ds.errors import DataError


def decode(data: bytes, where: str) -> Image.Image:
    """Decodes to RGB; transparent pixels become white, as in the reference.

    Raises:
        DataError: see `open_image`.
    """
    image = open_image(data, where)
    if not image.has_transparency_data:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB of RGB
MAX_ASPECT_RATIO = 200  # the image processor refuses more


def open_image(data: bytes, where: str) -> Image.Image:
    """Decodes all pixels of an image, so that nothing can fail later.

    Raises:
        DataError: not one of IMAGE_FORMATS, damaged, too large or too narrow; the message names `where`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _check_size(*image.size, where)
        image.load()
    # The errors of Pillow's decoders on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(
            f"the image cannot be decoded: {error} ({where}); allowed: {', '.join(IMAGE_FORMATS)} of at most "
            f"{MAX_IMAGE_PIXELS} pixels; replace the image"
        ) from error
    return image


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(
            f"the image has {width} x {height} pixels ({where}); allowed: at most {MAX_IMAGE_PIXELS} pixels and an "
            f"aspect ratio of at most {MAX_ASPECT_RATIO} : 1; scale or crop the image"
        )
