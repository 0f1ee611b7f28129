"""Draws FrozenLake maps with gymnasium's sprites, using only Pillow; equal maps give equal bytes."""

import io
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.tasks.vsp import GOAL, HOLE, START, Cell, MapDesc, at

SPRITES = ("tile_ice", "tile_hole", "letter_s", "letter_g", "goal_flag", "agent")
SPRITE_CELL_PX = 64  # the cell size that the sprites are made for
GRID_COLOUR = (180, 200, 230)
PATH_COLOUR = (200, 0, 160)  # in no sprite
PNG_COMPRESS_LEVEL = 6  # fixed, so that the bytes do not depend on a default


def load_sprites(cell_px: int) -> dict[str, Image.Image]:
    """The sprites, scaled to cells of `cell_px` pixels.

    Raises:
        ConfigError: gymnasium is not installed, or its version has other sprites.
    """
    spec = find_spec("gymnasium")  # finds the package without importing it
    remedy = "pip install 'mirage_ds[vsp]'"
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"gymnasium is not installed (in this Python); make-vsp draws with its sprites and needs the extra vsp; "
            f"{remedy}"
        )
    folder = Path(spec.origin).parent / "envs" / "toy_text" / "img"
    try:
        return {name: _scaled(Image.open(folder / f"{name}.png"), cell_px) for name in SPRITES}
    except OSError as error:
        raise ConfigError(
            f"a sprite of gymnasium cannot be read: {error} ({folder}); make-vsp needs those of gymnasium 1.4; {remedy}"
        ) from error


def _scaled(sprite: Image.Image, cell_px: int) -> Image.Image:
    size = [max(1, round(side * cell_px / SPRITE_CELL_PX)) for side in sprite.size]
    return sprite.convert("RGBA").resize((size[0], size[1]), Image.Resampling.BOX)


class Painter:
    """Draws maps with cells of one size."""

    def __init__(self, cell_px: int) -> None:
        self._cell_px = cell_px
        self._sprites = load_sprites(cell_px)

    def draw_map(self, map_desc: MapDesc, player: Cell) -> Image.Image:
        """The map with the player on one of its cells, as RGB."""
        side = len(map_desc) * self._cell_px
        image = Image.new("RGB", (side, side))
        for row in range(len(map_desc)):
            for column in range(len(map_desc)):
                self._draw_cell(image, at(map_desc, (row, column)), (row, column))
        self._paste(image, "agent", player, across=0.5, down=0.5)
        return image

    def draw_path(self, image: Image.Image, path: list[Cell]) -> None:
        """Draws a line through the centers of the cells of a path; consecutive cells are neighbors."""
        draw, half = ImageDraw.Draw(image), max(1, self._cell_px // 12)
        centers = [
            (column * self._cell_px + self._cell_px // 2, row * self._cell_px + self._cell_px // 2)
            for row, column in path
        ]
        for (x, y), (next_x, next_y) in pairwise(centers):
            ends = (min(x, next_x) - half, min(y, next_y) - half, max(x, next_x) + half, max(y, next_y) + half)
            draw.rectangle(ends, fill=PATH_COLOUR)

    def _draw_cell(self, image: Image.Image, kind: int, cell: Cell) -> None:
        self._paste(image, "tile_hole" if kind == HOLE else "tile_ice", cell)
        left, top = cell[1] * self._cell_px, cell[0] * self._cell_px
        edge = (left, top, left + self._cell_px - 1, top + self._cell_px - 1)
        ImageDraw.Draw(image).rectangle(edge, outline=GRID_COLOUR)
        if kind == START:
            self._paste(image, "letter_s", cell, across=0.08, down=0.08)
        if kind == GOAL:
            self._paste(image, "goal_flag", cell, across=0.5, down=0.8)
            self._paste(image, "letter_g", cell, across=0.08, down=0.08)

    def _paste(self, image: Image.Image, name: str, cell: Cell, across: float = 0.0, down: float = 0.0) -> None:
        """Draws a sprite on a cell; `across` and `down`: its position in the free space, 0 (left, top) to 1."""
        sprite = self._sprites[name]
        x = cell[1] * self._cell_px + round((self._cell_px - sprite.width) * across)
        y = cell[0] * self._cell_px + round((self._cell_px - sprite.height) * down)
        image.paste(sprite, (x, y), sprite)


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG, the same bytes each time."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()
