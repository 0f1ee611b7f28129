"""Puzzles of pieces on a square: drawn from a seed, without repeats, split into training and test.

A piece is some of the SIDE x SIDE cells, turned. All pieces are turned upright and laid on one square, and the question
is how many cells they cover together: NUM_COVERED, each as often as the others.

Puzzles come in fours, one of each answer, whose pieces have the same sizes and, laid together as they are drawn, the
same shape, perhaps turned or mirrored. So neither sizes nor that shape tell anything: the pieces have to be turned.

A puzzle is a test puzzle if the sha256 of its upright pieces, in sorted order, ends in the decimal digit 0; else a
training puzzle. So upright pieces that are laid together in training are never laid together in the test, in whatever
order they come and however they are turned:

    int(hashlib.sha256(json.dumps(sorted(upright pieces)).encode()).hexdigest(), 16) % 10 == 0
"""

import hashlib
import json
from collections import defaultdict
from functools import cache
from random import Random
from typing import NamedTuple

from data_tools.vsp_maps import Side

SIDE = 3
NUM_COVERED = (5, 6, 7, 8)  # the answers, in the order of their letters
MAX_DRAWN: dict[Side, int] = {"train": 20_000, "test": 2_000}  # of a level; far fewer than there are


class Level(NamedTuple):
    """How hard a puzzle is."""

    sizes: tuple[tuple[int, ...], ...]  # one of these: the cells of each piece
    turns: tuple[int, ...]  # quarters


THREE, FOUR = ((3, 3, 3),), ((2, 3, 2, 3), (3, 2, 3, 2))
LEVELS = {
    1: Level(THREE, turns=(0, 2)),
    2: Level(THREE, turns=(0, 1, 2, 3)),
    3: Level(FOUR, turns=(0, 2)),
    4: Level(FOUR, turns=(0, 1, 2, 3)),
}

Piece = tuple[int, ...]
"""The numbers of its cells in raster order, from 0, ascending."""

Sight = tuple[tuple[int, ...], Piece]
"""Sizes of the pieces; their shape together, as they are drawn: of all ways to turn and mirror it, the first."""


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
        return _together(self.upright)

    @property
    def at_first_sight(self) -> Sight:
        """What is seen without turning a piece: how many cells each has, and the shape of the drawn ones together."""
        return tuple(map(len, self.upright)), _first_way(_together(self.drawn))

    @property
    def side(self) -> Side:
        """The side of the puzzle, which never changes; about one in ten is for testing."""
        digest = hashlib.sha256(json.dumps(sorted(self.upright)).encode()).hexdigest()
        return "test" if int(digest, 16) % 10 == 0 else "train"

    @property
    def fingerprint(self) -> str:
        """sha256 of level, pieces and turns, in hexadecimal."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


@cache
def turned(piece: Piece, quarters: int) -> Piece:
    """The piece turned clockwise: cell (row, column) comes to (column, SIDE - 1 - row)."""
    for _ in range(quarters):
        piece = tuple(sorted(cell % SIDE * SIDE + SIDE - 1 - cell // SIDE for cell in piece))
    return piece


def draw_puzzles(level: int, side: Side, count: int, seed: int) -> list[Puzzle]:
    """`count` different puzzles of a level, at most MAX_DRAWN, in random order, in fours of equal first sight."""
    random = Random(f"{seed} {level} {side}")
    found: set[Puzzle] = set()
    waiting: dict[Sight, dict[int, list[Puzzle]]] = defaultdict(lambda: {answer: [] for answer in NUM_COVERED})
    puzzles: list[Puzzle] = []
    while len(puzzles) < count:
        puzzle = _draw_puzzle(level, random)
        if len(puzzle.covered) in NUM_COVERED and puzzle not in found and puzzle.side == side:
            found.add(puzzle)
            alike = waiting[puzzle.at_first_sight]
            alike[len(puzzle.covered)].append(puzzle)
            if all(alike.values()):
                puzzles += [of_answer.pop() for of_answer in alike.values()]
    del puzzles[count:]
    random.shuffle(puzzles)
    return puzzles


def _draw_puzzle(number: int, random: Random) -> Puzzle:
    """Of a level; its pieces are not all turned alike, as then they would lie together as if they were upright."""
    level = LEVELS[number]
    sizes = random.choice(level.sizes)
    pieces = tuple(tuple(sorted(random.sample(range(SIDE**2), size))) for size in sizes)
    while True:
        turns = tuple(random.choice(level.turns) for _ in sizes)
        if len(set(turns)) > 1:
            return Puzzle(number, pieces, turns)


def _together(pieces: tuple[Piece, ...]) -> Piece:
    return tuple(sorted({cell for piece in pieces for cell in piece}))


@cache
def _first_way(piece: Piece) -> Piece:
    """Of all ways to turn and mirror a piece, the first: the same for each of them."""
    mirrored = tuple(sorted(cell // SIDE * SIDE + SIDE - 1 - cell % SIDE for cell in piece))
    return min(turned(way, quarters) for way in (piece, mirrored) for quarters in range(4))
