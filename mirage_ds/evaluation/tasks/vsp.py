r"""Scores answers to spatial planning: the moves in an answer's last \boxed{...}, walked on the map.

An answer ends as "Reached goal" (success), "Fell in hole", "Did not reach goal" or "Invalid".

A map is a square list of rows: 1 start, 2 goal, -1 hole, 0 safe. A cell is (row, column).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.given import extract_boxed
from mirage_ds.evaluation.tasks.outcome import INVALID, Outcome

SAFE, START, GOAL, HOLE = 0, 1, 2, -1
MOVES = {"LEFT": (0, -1), "RIGHT": (0, 1), "UP": (-1, 0), "DOWN": (1, 0)}

MapDesc = list[list[int]]
Cell = tuple[int, int]
Mode = Literal["reference", "strict"]

_BY_LETTER = {name[0]: name for name in MOVES}
_WORD = f"(?:{'|'.join((*MOVES, *_BY_LETTER))})"
_MOVE_LIST = re.compile(rf"\s*{_WORD}(?:(?:\s*,\s*|\s+){_WORD})*\s*")


def score(map_desc: Any, answer: str, mode: Mode = "strict") -> Outcome:
    """The outcome of an answer: its last box is extracted, parsed and walked.

    Raises:
        DataError: the map is not valid.
    """
    moves = parse_moves(extract_boxed(answer), mode)
    if moves is None:
        return Outcome(False, INVALID)
    return replace(simulate(map_desc, moves), given=" ".join(moves))


def parse_moves(answer: str | None, mode: Mode = "strict") -> list[str] | None:
    """The moves that a box names, each a key of MOVES; None if it is not valid.

    Args:
        answer: a box's content, or None if there is no box.
        mode: `strict`: one or more of LEFT, RIGHT, UP, DOWN or L, R, U, D, in either case, separated by commas or
            spaces, and nothing else. `reference`: as the reference scores, every letter U, D, L, R anywhere is a move
            ("Turn right" has three), and everything is valid, no box being no moves.
    """
    text = (answer or "").upper()
    if mode == "reference":
        return [_BY_LETTER[letter] for letter in text if letter in _BY_LETTER]
    if not _MOVE_LIST.fullmatch(text):
        return None
    return [_BY_LETTER[word[0]] for word in re.findall(_WORD, text)]


def simulate(map_desc: Any, moves: Sequence[str]) -> Outcome:
    """Walks from the start. A hole ends the walk; success is to stand on the goal at the end, not to pass over it.

    Raises:
        DataError: the map is not valid.
    """
    cell = find_start(map_desc)
    for move in moves:
        cell = step(map_desc, cell, move)
        if at(map_desc, cell) == HOLE:
            return Outcome(False, "Fell in hole")
    success = at(map_desc, cell) == GOAL
    return Outcome(success, "Reached goal" if success else "Did not reach goal")


def step(map_desc: MapDesc, cell: Cell, move: str) -> Cell:
    """The cell after a move; a move off the map stays where it is."""
    row, column = (place + change for place, change in zip(cell, MOVES[move], strict=True))
    return (row, column) if 0 <= row < len(map_desc) and 0 <= column < len(map_desc) else cell


def at(map_desc: MapDesc, cell: Cell) -> int:
    """The value of a cell."""
    return map_desc[cell[0]][cell[1]]


def find_start(map_desc: Any) -> Cell:
    """The start of a map, which comes from a row's field and may be anything.

    Raises:
        DataError: it is not a square with exactly one start and one goal.
    """
    rows = map_desc if isinstance(map_desc, list) else []
    cells = [value for row in rows if isinstance(row, list) and len(row) == len(rows) for value in row]
    known = [value for value in cells if type(value) is int and value in (SAFE, START, GOAL, HOLE)]
    if len(known) != len(rows) ** 2 or (known.count(START), known.count(GOAL)) != (1, 1):
        raise DataError(
            f"map_desc is {map_desc!r:.80} (in a row that is to be scored); expected a square list of rows of 0, -1, "
            "exactly one 1 (start) and one 2 (goal); fix the row"
        )
    return divmod(known.index(START), len(rows))
