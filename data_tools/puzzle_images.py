"""Draws puzzles with Pillow: the turned pieces side by side, and the square that they cover together."""

from PIL import Image, ImageDraw

from data_tools.puzzle_pieces import SIDE, Piece, Puzzle

EMPTY_COLOUR = (245, 245, 240)
COVERED_COLOUR = (40, 80, 170)
GRID_COLOUR = (170, 170, 170)
EDGE_COLOUR = (220, 30, 30)
BETWEEN_COLOUR = (110, 110, 110)  # the column of cells between two pieces


def draw_question(puzzle: Puzzle, cell_px: int) -> Image.Image:
    """The pieces as they are turned, each with its upper edge in red; a column of cells lies between two of them."""
    step = (SIDE + 1) * cell_px
    image = Image.new("RGB", (len(puzzle.upright) * step - cell_px, SIDE * cell_px), BETWEEN_COLOUR)
    for number, (piece, quarters) in enumerate(zip(puzzle.drawn, puzzle.turns, strict=True)):
        square = draw_square(piece, cell_px)
        _draw_edge(square, quarters, max(2, cell_px // 5))
        image.paste(square, (number * step, 0))
    return image


def draw_square(piece: Piece, cell_px: int) -> Image.Image:
    """All cells of the square, those of the piece in the colour of covered ones."""
    image = Image.new("RGB", (SIDE * cell_px, SIDE * cell_px))
    draw = ImageDraw.Draw(image)
    for cell in range(SIDE**2):
        left, top = cell % SIDE * cell_px, cell // SIDE * cell_px
        colour = COVERED_COLOUR if cell in piece else EMPTY_COLOUR
        draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), fill=colour, outline=GRID_COLOUR)
    return image


def _draw_edge(square: Image.Image, quarters: int, thickness: int) -> None:
    """A red line inside the edge that was the upper one before the turn: top, right, bottom or left."""
    far, last = square.width - thickness, square.width - 1
    lines = ((0, 0, last, thickness - 1), (far, 0, last, last), (0, far, last, last), (0, 0, thickness - 1, last))
    ImageDraw.Draw(square).rectangle(lines[quarters], fill=EDGE_COLOUR)
