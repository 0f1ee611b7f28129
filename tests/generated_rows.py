"""Generated rows and images of the same shapes as the reference's spatial-reasoning rows."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


def image_bytes(size: tuple[int, int] = (84, 84), seed: int = 0, image_format: str = "PNG", mode: str = "RGB") -> bytes:
    """A map of 28-pixel cells in a few colours that depend on the seed."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for number in range(9):
        x, y = number % 3 * 28, number // 3 * 28
        shade = 37 * seed * (number + 1) % 256
        draw.rectangle((x, y, x + 27, y + 27), fill=(shade, 255 - shade, 29 * number % 256))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format=image_format)
    return buffer.getvalue()


def other_pixel(image: bytes) -> bytes:
    """The image with one other pixel, in its middle."""
    changed = Image.open(io.BytesIO(image)).convert("RGB")
    middle = (changed.width // 2, changed.height // 2)
    changed.putpixel(middle, tuple(255 - value for value in changed.getpixel(middle)))
    buffer = io.BytesIO()
    changed.save(buffer, format="PNG")
    return buffer.getvalue()


def make_row(number: int) -> dict[str, Any]:
    """One row; its images are images/NUMBER_0.png (input) and images/NUMBER_1.png (helper)."""
    letter = "ABC"[number % 3]
    return {
        "text_input": f"\nDoes the plan reach the goal?\nHere is the map: <image>\n\nPlan: UP, LEFT x {number}\n",
        "image_input": f"images/{number}_0.png",
        "image_output": f"images/{number}_1.png",
        "text_output": f"<think> step {number} </think><output_image><think> then </think>So \\boxed{{{letter}}}.",
        "id": f"row-{number}",
        "map_desc": [[1, 0], [-1, number]],
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes the rows, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rows(folder: Path, count: int = 10) -> Path:
    """Writes `count` rows with their images, of several sizes, and returns the JSONL file."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        for place in (0, 1):
            size = (84 + 28 * (number % 3), 84 + 7 * place)
            (folder / "images" / f"{number}_{place}.png").write_bytes(image_bytes(size, seed=2 * number + place))
    return write_jsonl(folder / "rows.jsonl", [make_row(number) for number in range(count)])
