"""Images as parts of the page: scaled down, as data: URLs."""

import base64
import io

from PIL import Image

from mirage_ds.evaluation.report.contents import Picture

MAX_SIDE_PX = 480
HEAT_SIDE_PX = 200  # of a heat map: there is one per latent and image
JPEG_QUALITY = 85


def picture(image: Image.Image, alt: str, caption: str = "", max_side: int = MAX_SIDE_PX) -> Picture:
    """An image, scaled down to at most `max_side` pixels: PNG (drawings) or JPEG (photos), whichever is smaller."""
    small = image.copy()
    small.thumbnail((max_side, max_side))
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    kind, data = min(("png", png.getvalue()), ("jpeg", jpeg.getvalue()), key=lambda each: len(each[1]))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, *small.size, caption)
