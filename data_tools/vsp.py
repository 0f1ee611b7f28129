r"""Generates spatial tasks on FrozenLake maps: rows in the reference's format, with images, for training and testing.

planning:  find a shortest path to the goal. Helper image: the map with that path drawn on it.
           Answer: \boxed{RIGHT, DOWN}; it has no <output_image>, so the latents come first.
reasoning: does a plan reach the goal (A), fall into a hole (B), or end safe elsewhere (C)?
           Helper image: the map at a later step of the plan.
           Answer: <think> ... </think><output_image><think> ... </think>The answer is \boxed{A}.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

from PIL import Image

from data_tools.vsp_images import Painter, png_bytes
from data_tools.vsp_maps import (
    SIDES,
    Side,
    draw_maps,
    fingerprint,
    num_available,
    routes,
    shortest_path,
    walk,
)
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.tasks.vsp import GOAL, HOLE, MOVES, SAFE, START, Cell, MapDesc, at, find_start, step
from mirage_ds.output_folder import new_folder

Style = Literal["planning", "reasoning"]
PromptLength = Literal["long", "short"]

_RULES = """The picture shows a frozen lake from above, cut into square cells. The player begins on the cell marked S. \
The flag marked G is the goal. Dark cells are holes in the ice; all other cells are safe.

Rules:
- The moves are LEFT, RIGHT, UP and DOWN. Each takes the player to the next cell in that direction.
- A move that would leave the map leaves the player where it is.
- A player who steps on a hole has lost.

The map: <image>

"""
# The short ones have at most 16 tokens in Qwen2.5's vocabulary, with <image> as one token and without the plan.
PROMPTS: dict[tuple[Style, PromptLength], str] = {
    ("planning", "long"): _RULES + "Find a way to the goal that avoids every hole and has as few moves as possible. "
    "Answer with the moves in their order, separated by commas, within \\boxed{}.",
    ("planning", "short"): "<image> Shortest way to the goal?",
    ("reasoning", "long"): _RULES + "The player makes these moves: {plan}\n\n"
    "How does it end?\n"
    "A. The player stands on the goal.\n"
    "B. The player falls into a hole.\n"
    "C. The player is safe, but not on the goal.\n\n"
    "Think step by step within <think> </think>, then give the letter within \\boxed{}.",
    ("reasoning", "short"): "<image> Goal A, hole B or neither C? {plan}",
}

_CELL_NAMES = {SAFE: "safe", START: "the start", GOAL: "the goal", HOLE: "a hole"}
_ENDINGS = {
    "A": "The player stands on the goal.",
    "B": "The player is in a hole.",
    "C": "The player is safe, but not on the goal.",
}


def make_vsp(
    output: Path,
    *,
    levels: range,
    num_train: int,
    num_test: int,
    cell_px: int,
    style: Style,
    prompt: PromptLength,
    seed: int,
) -> None:
    """Writes train.jsonl, test.jsonl and images/ to `output`, completely or not at all; equal arguments, equal bytes.

    Args:
        levels: sizes of the maps; each gets an equal share of the rows, as far as it has enough maps.
        cell_px: side of a cell; 28 gives one merged token per cell.
    Raises:
        ConfigError: gymnasium is not installed.
        DataError: more maps are requested than exist, or `output` already exists.
    """
    painter = Painter(cell_px)
    requested = {"train": num_train, "test": num_test}
    shares = {side: share_out(requested[side], levels, side) for side in SIDES}
    with new_folder(output) as folder:
        for level in levels:
            (folder / "images" / f"level_{level}").mkdir(parents=True)
        for side in SIDES:
            maps = (map_desc for level in levels for map_desc in draw_maps(level, side, shares[side][level], seed))
            writer = RowWriter(folder, painter, PROMPTS[style, prompt], Random(f"{seed} {side} plans"))
            write = writer.planning_row if style == "planning" else writer.reasoning_row
            _write_rows(folder / f"{side}.jsonl", (write(map_desc) for map_desc in maps))


def parse_levels(text: str, smallest: int = 2) -> range:
    """`3` or `3-6`, both ends included.

    Raises:
        ConfigError: the text has another form, or a level is below the smallest.
    """
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not smallest <= first <= last:
        raise ConfigError(
            f"invalid levels {text!r:.80} (--levels); allowed: a number of at least {smallest}, or a range of them, "
            "the smaller one first; write for example 3 or 3-6"
        )
    return range(first, last + 1)


def share_out(requested: int, levels: range, side: Side) -> dict[int, int]:
    """Number of maps from each level: equal shares, and the rest from the levels that have more maps.

    Raises:
        DataError: the levels together have too few maps.
    """
    available = {level: num_available(level, side) for level in levels}
    if requested > sum(available.values()):
        raise DataError(
            f"too many maps requested (--num-{side} {requested}); levels {levels[0]}-{levels[-1]} have "
            f"{sum(available.values())} different ones for {side}; request fewer maps, or more levels"
        )
    shares = {}
    for number, level in enumerate(sorted(levels, key=lambda level: available[level])):
        shares[level] = min(available[level], requested // (len(levels) - number))
        requested -= shares[level]
    return shares


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


class RowWriter:
    """Creates the rows of one side, and writes their images."""

    def __init__(self, folder: Path, painter: Painter, prompt: str, random: Random) -> None:
        self._folder = folder
        self._painter = painter
        self._prompt = prompt
        self._random = random
        self._outcomes = Counter({outcome: 0 for outcome in _ENDINGS})

    def planning_row(self, map_desc: MapDesc) -> dict[str, Any]:
        """The map, and the map with a shortest path."""
        moves = shortest_path(map_desc)
        assert moves, "only solvable maps are drawn"
        path = walk(map_desc, moves)
        helper = self._painter.draw_map(map_desc, path[0])
        self._painter.draw_path(helper, path)
        return self._row(map_desc, self._prompt, f"\\boxed{{{', '.join(moves)}}}", helper, "path")

    def reasoning_row(self, map_desc: MapDesc) -> dict[str, Any]:
        """The map with a plan, and the map at a later step of it."""
        outcome, plan = self._draw_plan(map_desc)
        cells = walk(map_desc, plan)
        seen = self._random.randint(1, len(plan))
        helper = self._painter.draw_map(map_desc, cells[seen])
        steps = [
            f"{move} leads to {cell}, {_CELL_NAMES[at(map_desc, cell)]}."
            for move, cell in zip(plan, cells[1:], strict=True)
        ]
        answer = (
            f"<think> {' '.join(steps[:seen])} </think><output_image>"
            f"<think> {' '.join([*steps[seen:], _ENDINGS[outcome]])} </think>The answer is \\boxed{{{outcome}}}."
        )
        return self._row(map_desc, self._prompt.replace("{plan}", ", ".join(plan)), answer, helper, f"step_{seen}")

    def _row(
        self, map_desc: MapDesc, question: str, answer: str, helper: Image.Image, helper_name: str
    ) -> dict[str, Any]:
        level, map_id = len(map_desc), fingerprint(map_desc)[:16]
        paths = [f"images/level_{level}/{map_id}_{name}.png" for name in ("map", helper_name)]
        for path, image in zip(paths, (self._painter.draw_map(map_desc, find_start(map_desc)), helper), strict=True):
            (self._folder / path).write_bytes(png_bytes(image))
        return {
            "text_input": question,
            "image_input": paths[0],
            "image_output": paths[1],
            "text_output": answer,
            "map_desc": map_desc,
            "map_id": map_id,
            "level": level,
        }

    def _draw_plan(self, map_desc: MapDesc) -> tuple[str, list[str]]:
        """The rarest outcome so far that the map allows, and a plan for it: random moves, then a shortest route.

        Only the last move may enter the goal or a hole, so it does not matter whether the game would end there.
        """
        start = find_start(map_desc)
        targets = self._targets(map_desc, start)
        outcome = min(targets, key=lambda outcome: self._outcomes[outcome])
        self._outcomes[outcome] += 1
        moves, cell = self._random_moves(map_desc, start)
        target = self._random.choice(targets[outcome])
        return outcome, moves + routes(map_desc, cell)[target]

    @staticmethod
    def _targets(map_desc: MapDesc, start: Cell) -> dict[str, list[Cell]]:
        """The cells where a plan can end, for each possible outcome."""
        reached = [cell for cell in routes(map_desc, start) if cell != start]
        by_outcome = {"A": (GOAL,), "B": (HOLE,), "C": (SAFE,)}
        targets = {
            name: [cell for cell in reached if at(map_desc, cell) in kinds] for name, kinds in by_outcome.items()
        }
        return {outcome: cells for outcome, cells in targets.items() if cells}

    def _random_moves(self, map_desc: MapDesc, cell: Cell) -> tuple[list[str], Cell]:
        """A few random moves over safe cells, and where they end."""
        moves: list[str] = []
        for _ in range(self._random.randrange(len(map_desc))):
            safe = [move for move in MOVES if at(map_desc, step(map_desc, cell, move)) in (SAFE, START)]
            if safe:
                moves.append(self._random.choice(safe))
                cell = step(map_desc, cell, moves[-1])
        return moves, cell
