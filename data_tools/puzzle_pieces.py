"""Puzzles of pieces on a square: drawn from a seed, without repeats, split into training and test.

A piece is some of the SIDE x SIDE cells, turned by quarters. All pieces are turned upright and laid on one square, and
the question is how many cells they cover together: NUM_COVERED, each as often as the others. The pieces of a level have
equally many cells, so the number says only which cells lie on each other: no piece alone, and no sum, tells it.

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
# Level, which is the number of pieces -> the cells of each: together they can cover the most that is asked for.
PIECE_CELLS = {2: 4, 3: 3, 4: 2}
# Of one level. The rarest answer of level 2 has about 9000 training and 1000 test puzzles.
MAX_DRAWN: dict[Side, int] = {"train": 30_000, "test": 2_000}

Piece = tuple[int, ...]
"""The numbers of its cells in raster order, from 0, ascending."""


class Puzzle(NamedTuple):
    """Pieces, and how they are turned."""

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
        """sha256 of pieces and turns, in hexadecimal."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


def turned(piece: Piece, quarters: int) -> Piece:
    """The piece turned clockwise: cell (row, column) comes to (column, SIDE - 1 - row)."""
    for _ in range(quarters):
        piece = tuple(sorted(cell % SIDE * SIDE + SIDE - 1 - cell // SIDE for cell in piece))
    return piece


def draw_puzzles(level: int, side: Side, count: int, seed: int) -> list[Puzzle]:
    """`count` different puzzles of `level` pieces, at most MAX_DRAWN, in random order; the answers are balanced."""
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


def _draw_puzzle(level: int, random: Random) -> Puzzle:
    pieces = (tuple(sorted(random.sample(range(SIDE**2), PIECE_CELLS[level]))) for _ in range(level))
    return Puzzle(tuple(pieces), tuple(random.randrange(4) for _ in range(level)))
