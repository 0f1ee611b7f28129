"""The examples of docs/importing.md as files with rows: what is published, and what it becomes."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from imported import COLOURS, png

PAGE = Path(__file__).parents[1] / "docs" / "importing.md"
_EXAMPLE = re.compile(r"^### ([\w-]+)\n.*?```json\n(.*?)\n```\n```json\n(.*?)\n```", re.DOTALL | re.MULTILINE)
SAID = "iVBORw0..."  # the bytes of an image


def examples() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By format: a row, and the row that it becomes."""
    return {
        name: (json.loads(published), json.loads(ours)) for name, published, ours in _EXAMPLE.findall(PAGE.read_text())
    }


def write_published(folder: Path, name: str, row: dict[str, Any]) -> Path:
    """A JSON list with the row, and the images that it names."""
    colours = iter(COLOURS)

    def with_images(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_images(each) for key, each in value.items()}
        if isinstance(value, list):
            return [with_images(each) for each in value]
        if isinstance(value, str) and SAID in value:
            # A size at which base64 alone is long enough to be told from a path.
            return value.replace(SAID, base64.b64encode(png(next(colours), (112, 84))).decode())
        if isinstance(value, str) and value.endswith(".png"):
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).write_bytes(png(next(colours)))
        return value

    folder.mkdir(parents=True)
    extra = {"comt": ("images/creation/7-0.png", "images/creation/7-1.jpg"), "mmvp": ("1.jpg",)}
    for path in extra.get(name, ()):
        with_images(f"{path}.png")
        (folder / f"{path}.png").rename(folder / path)
    path = folder / "rows.json"
    path.write_text(json.dumps([with_images(row)]))
    return path


def without_digests(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ours with `images/...` for each path of an image."""
    names = ("image_input", "image_output")
    return row | {name: ["images/..." for _ in row[name]] for name in names if name in row}
