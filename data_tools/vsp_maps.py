"""Solvable FrozenLake maps and paths through them: drawn from a seed, without repeats, split into training and test.

A map is a test map if the sha256 of its JSON, as a number, ends in the decimal digit 0; else a training map. So no map
can be on both sides, whatever the seed and the number of rows:

    int(hashlib.sha256(json.dumps(map_desc).encode()).hexdigest(), 16) % 10 == 0
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from random import Random
from typing import Literal

from mirage_ds.evaluation.tasks.vsp import GOAL, HOLE, MOVES, SAFE, START, Cell, MapDesc, at, find_start, step

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = ("train", "test")

# Up to this level all maps are enumerated (6792 of level 3), so that all of them can be drawn.
LARGEST_LISTED_LEVEL = 3
# Above it, maps are drawn at random and repeats dropped; drawing more than this of one level would be slow.
MAX_DRAWN: dict[Side, int] = {"train": 100_000, "test": 10_000}
HOLE_SHARE = 0.2  # of the cells of a drawn map, before unsolvable maps are dropped


def fingerprint(map_desc: MapDesc) -> str:
    """sha256 of the map's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(map_desc).encode()).hexdigest()


def side_of(map_desc: MapDesc) -> Side:
    """The side of a map, which never changes; about one in ten is for testing."""
    return "test" if int(fingerprint(map_desc), 16) % 10 == 0 else "train"


def routes(map_desc: MapDesc, source: Cell) -> dict[Cell, list[str]]:
    """A shortest list of moves to each cell that can be reached from `source`.

    Holes and the goal end a route, so no route passes through one. Of several shortest routes, it is the first in the
    order of MOVES.
    """
    found: dict[Cell, list[str]] = {source: []}
    waiting = deque([source])
    while waiting:
        cell = waiting.popleft()
        for move in MOVES:
            after = step(map_desc, cell, move)
            if after not in found:
                found[after] = [*found[cell], move]
                if at(map_desc, after) in (SAFE, START):
                    waiting.append(after)
    return found


def shortest_path(map_desc: MapDesc) -> list[str] | None:
    """The moves from start to goal; None if there is no path."""
    reached = routes(map_desc, find_start(map_desc))
    return next((moves for cell, moves in reached.items() if at(map_desc, cell) == GOAL), None)


def walk(map_desc: MapDesc, moves: list[str]) -> list[Cell]:
    """The cells visited by the moves, from the start on."""
    cells = [find_start(map_desc)]
    for move in moves:
        cells.append(step(map_desc, cells[-1], move))
    return cells


def num_available(level: int, side: Side) -> int:
    """How many maps of one level and side can be drawn."""
    return len(_list_maps(level, side)) if level <= LARGEST_LISTED_LEVEL else MAX_DRAWN[side]


def draw_maps(level: int, side: Side, count: int, seed: int) -> list[MapDesc]:
    """`count` different solvable maps of `level` x `level` cells; at most `num_available`."""
    random = Random(f"{seed} {level} {side}")
    if level <= LARGEST_LISTED_LEVEL:
        return random.sample(_list_maps(level, side), count)
    maps: dict[str, MapDesc] = {}
    while len(maps) < count:
        map_desc = _draw_map(level, random)
        if side_of(map_desc) == side and shortest_path(map_desc):
            maps[fingerprint(map_desc)] = map_desc
    return list(maps.values())


@cache
def _list_maps(level: int, side: Side) -> list[MapDesc]:
    return [map_desc for map_desc in _every_map(level) if side_of(map_desc) == side and shortest_path(map_desc)]


def _every_map(level: int) -> Iterator[MapDesc]:
    for start, goal in permutations(range(level**2), 2):
        for rest in product((SAFE, HOLE), repeat=level**2 - 2):
            yield _to_map(level, start, goal, list(rest))


def _draw_map(level: int, random: Random) -> MapDesc:
    start, goal = random.sample(range(level**2), 2)
    return _to_map(level, start, goal, [HOLE if random.random() < HOLE_SHARE else SAFE for _ in range(level**2 - 2)])


def _to_map(level: int, start: int, goal: int, rest: list[int]) -> MapDesc:
    """A map with start and goal at their positions and the other cells in order."""
    cells = iter(rest)
    values = [START if place == start else GOAL if place == goal else next(cells) for place in range(level**2)]
    return [values[row * level : (row + 1) * level] for row in range(level)]
