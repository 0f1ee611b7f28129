"""Puzzles of pieces on a square: drawn from a seed, without repeats, split into training and test.

A piece is some of the SIDE x SIDE cells, turned. All pieces are turned upright and laid on one square, and the question
is how many cells they cover together: NUM_COVERED, each as often as the others. The pieces of a level have equally many
cells, so the number depends only on which cells lie on each other: no piece alone, and no sum, tells it.

A puzzle is a test puzzle if the sha256 of its upright pieces, in sorted order, ends in the decimal digit 0; else a
training puzzle. So upright pieces that are laid together in training are never laid together in the test, in whatever
order they come and however they are turned:

    int(hashlib.sha256(json.dumps(sorted(upright pieces)).encode()).hexdigest(), 16) % 10 == 0
"""

import hashlib
import json
from collections import Counter
from random import Random
from typing import NamedTuple

from data_tools.vsp_maps import Side

SIDE = 3
NUM_COVERED = (5, 6, 7, 8)  # the answers, in the order of their letters


class Level(NamedTuple):
    """How hard a puzzle is."""

    num_pieces: int
    num_cells: int  # of each piece; together they can cover the most that is asked for
    turns: tuple[int, ...]  # quarters
    max_drawn: dict[Side, int]  # by the rarest answer, of which there are few where two pieces cover 8 cells


LEVELS = {
    1: Level(2, 4, (0, 2), {"train": 8_000, "test": 800}),
    2: Level(2, 4, (0, 1, 2, 3), {"train": 30_000, "test": 2_000}),
    3: Level(3, 3, (0, 1, 2, 3), {"train": 30_000, "test": 2_000}),
    4: Level(4, 2, (0, 1, 2, 3), {"train": 30_000, "test": 2_000}),
}

Piece = tuple[int, ...]
"""The numbers of its cells in raster order, from 0, ascending."""


class Puzzle(NamedTuple):
    """Pieces, and how they are turned."""

    level: int
    upright: tuple[Piece, ...]
    turns: tuple[int, ...]  # quarters, clockwise, by which each one is drawn turned

    @property
    def drawn(self) -> tuple[Piece, ...]:
        """The pieces as they are drawn."""
        return tuple(turned(piece, turns) for piece, turns in zip(self.upright, self.turns, strict=True))

    @property
    def covered(self) -> Piece:
        """The cells that the upright pieces cover together."""
        return tuple(sorted({cell for piece in self.upright for cell in piece}))

    @property
    def side(self) -> Side:
        """The side of the puzzle, which never changes; about one in ten is for testing."""
        digest = hashlib.sha256(json.dumps(sorted(self.upright)).encode()).hexdigest()
        return "test" if int(digest, 16) % 10 == 0 else "train"

    @property
    def fingerprint(self) -> str:
        """sha256 of level, pieces and turns, in hexadecimal."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


def turned(piece: Piece, quarters: int) -> Piece:
    """The piece turned clockwise: cell (row, column) comes to (column, SIDE - 1 - row)."""
    for _ in range(quarters):
        piece = tuple(sorted(cell % SIDE * SIDE + SIDE - 1 - cell // SIDE for cell in piece))
    return piece


def draw_puzzles(level: int, side: Side, count: int, seed: int) -> list[Puzzle]:
    """`count` different puzzles of a level, at most `max_drawn`, in random order; the answers are balanced."""
    random = Random(f"{seed} {level} {side}")
    wanted = Counter(NUM_COVERED[number % len(NUM_COVERED)] for number in range(count))
    found: set[Puzzle] = set()
    puzzles: list[Puzzle] = []
    while len(puzzles) < count:
        puzzle = _draw_puzzle(level, random)
        if wanted[len(puzzle.covered)] and puzzle.side == side and puzzle not in found:
            wanted[len(puzzle.covered)] -= 1
            found.add(puzzle)
            puzzles.append(puzzle)
    random.shuffle(puzzles)  # the frequent answers were found first
    return puzzles


def _draw_puzzle(number: int, random: Random) -> Puzzle:
    level = LEVELS[number]
    pieces = (tuple(sorted(random.sample(range(SIDE**2), level.num_cells))) for _ in range(level.num_pieces))
    return Puzzle(number, tuple(pieces), tuple(random.choice(level.turns) for _ in range(level.num_pieces)))
