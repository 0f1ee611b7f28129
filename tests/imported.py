"""Imports hand-made rows, and says what came out."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generated_rows import write_jsonl
from PIL import Image

from data_tools.importing.options import Options
from data_tools.importing.rows import import_rows

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "white")


def png(colour: str = "red", size: tuple[int, int] = (56, 56), image_format: str = "PNG") -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=image_format)
    return buffer.getvalue()


def put(folder: Path, *names: str, size: tuple[int, int] = (56, 56)) -> None:
    """Writes an image for each name: red, lime, blue, ..."""
    for name, colour in zip(names, COLOURS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(colour, size))


@dataclass
class Imported:
    """What an import has written."""

    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def left_out(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "left_out.jsonl").read_text().splitlines()]

    def colours(self, paths: list[str]) -> list[str]:
        """Of images of one colour each."""
        names = {Image.new("RGB", (1, 1), name).getpixel((0, 0)): name for name in COLOURS}
        found = []
        for path in paths:
            image = Image.open(self.folder / path).convert("RGB")
            ((_, colour),) = image.getcolors(1) or [(0, None)]
            found.append(names[colour])
        return found

    def shown(self) -> list[dict[str, Any]]:
        """The rows with the colours of their images."""
        names = ("image_input", "image_output")
        return [row | {name: self.colours(row[name]) for name in names if name in row} for row in self.rows]


def import_file(folder: Path, format_name: str, path: Path, **options: Any) -> Imported:
    chosen = Options(**{name: options.pop(name) for name in ("margin", "all_turns") if name in options})
    output = folder / f"imported-{len(list(folder.glob('imported-*')))}"
    import_rows(format_name, [str(path)], output, options=chosen, **options)
    return Imported(output)


def import_made(folder: Path, format_name: str, rows: list[dict[str, Any]], **options: Any) -> Imported:
    """Imports rows as JSONL; images are relative to `folder`."""
    return import_file(folder, format_name, write_jsonl(folder / "source.jsonl", rows), **options)
