"""Images as parts of the page: scaled down, as data: URLs, and with a heat map laid over them."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from mirage_ds.evaluation.report.contents import Picture

MAX_SIDE_PX = 480
HEAT_SIDE_PX = 200  # there is one per latent and image
JPEG_QUALITY = 85
HEAT_WEIGHT = 0.65  # of the colour; the rest is the image, in grey
# From low to high; lightness grows all the way, so that it can be read without seeing colours, and in print.
HEAT_COLORS = ((20, 11, 53), (101, 21, 110), (187, 55, 84), (243, 119, 25), (252, 255, 164))


def picture(image: Image.Image, alt: str, caption: str = "", max_side: int = MAX_SIDE_PX) -> Picture:
    """An image, scaled down to at most `max_side` pixels: PNG (drawings) or JPEG (photos), whichever is smaller."""
    small = image.copy()
    small.thumbnail((max_side, max_side))
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    kind, data = min(("png", png.getvalue()), ("jpeg", jpeg.getvalue()), key=lambda each: len(each[1]))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, *small.size, caption)


def heat_picture(
    image: Image.Image, heat: npt.NDArray[np.float32], low: float, high: float, alt: str, caption: str
) -> Picture:
    """An image in grey with one colour for each of its patches.

    Args:
        heat: [rows, columns] of merged patches.
        low, high: the values of the first and the last colour.
    """
    scaled = image.convert("L").convert("RGB")
    scaled.thumbnail((HEAT_SIDE_PX, HEAT_SIDE_PX))
    places = np.clip((heat - low) / max(high - low, 1e-9), 0, 1) * (len(HEAT_COLORS) - 1)
    channels = [np.interp(places, range(len(HEAT_COLORS)), channel) for channel in zip(*HEAT_COLORS, strict=True)]
    colors = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    colors = colors.resize(scaled.size, Image.Resampling.NEAREST)  # a patch is one square, as the model has it
    return picture(Image.blend(scaled, colors, HEAT_WEIGHT), alt, caption, HEAT_SIDE_PX)
