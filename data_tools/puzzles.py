r"""Generates puzzles whose answer is seen in a picture that the question does not show: rows, with images.

Input image: three or four pieces, each turned, its upper edge red. Helper image: the pieces turned upright and laid on
one square. Question: how many cells do they cover, 5, 6, 7 or 8 (A to D)? In the helper image they only have to be
counted. Answer: Together: <output_image>\boxed{B}, so no words stand for the picture in a text baseline.
"""

import json
from pathlib import Path
from typing import Any

from data_tools.puzzle_images import draw_question, draw_square
from data_tools.puzzle_pieces import LEVELS, MAX_DRAWN, NUM_COVERED, Puzzle, draw_puzzles
from data_tools.vsp_images import png_bytes
from data_tools.vsp_maps import SIDES, Side
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.output_folder import new_folder

LETTERS = "ABCD"
OPTIONS = [f"{number} cells" for number in NUM_COVERED]
QUESTION = "<image> Red edges up, pieces on each other: cells covered? "
QUESTION += ", ".join(f"{letter} {number}" for letter, number in zip(LETTERS, NUM_COVERED, strict=True))
ANSWER = "Together: <output_image>\\boxed{{{letter}}}"


def make_puzzles(output: Path, *, levels: range, num_train: int, num_test: int, cell_px: int, seed: int) -> None:
    """Writes train.jsonl, test.jsonl and images/ to `output`, completely or not at all; equal arguments, equal bytes.

    Args:
        levels: of LEVELS; each gets an equal share of the rows, the first ones one more if they do not divide.
        cell_px: side of a cell; 28 gives one merged token per cell.
    Raises:
        ConfigError: there is no such level.
        DataError: more puzzles are requested than are drawn, or `output` already exists.
    """
    requested: dict[Side, int] = {"train": num_train, "test": num_test}
    shares = {side: _share_out(requested[side], levels, side) for side in SIDES}
    with new_folder(output) as folder:
        for level in levels:
            (folder / "images" / f"level_{level}").mkdir(parents=True)
        for side in SIDES:
            puzzles = (one for level in levels for one in draw_puzzles(level, side, shares[side][level], seed))
            with (folder / f"{side}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_write_row(folder, puzzle, cell_px)) + "\n" for puzzle in puzzles)


def _share_out(requested: int, levels: range, side: Side) -> dict[int, int]:
    """The number of puzzles of each level."""
    if unknown := [level for level in levels if level not in LEVELS]:
        raise ConfigError(
            f"there is no level {unknown[0]} (--levels {levels[0]}-{levels[-1]}); allowed are {min(LEVELS)} to "
            f"{max(LEVELS)}; write for example 2 or 1-4"
        )
    shares = {level: len(range(place, requested, len(levels))) for place, level in enumerate(levels)}
    for level, share in shares.items():
        if share > (most := MAX_DRAWN[side]):
            raise DataError(
                f"too many puzzles requested (--num-{side} {requested}, {share} of level {level}); of a level at "
                f"most {most} are drawn for {side}; request fewer, or more levels"
            )
    return shares


def _write_row(folder: Path, puzzle: Puzzle, cell_px: int) -> dict[str, Any]:
    """The row of a puzzle; writes its images."""
    level, puzzle_id = puzzle.level, puzzle.fingerprint[:16]
    images = {
        f"images/level_{level}/{puzzle_id}_pieces.png": draw_question(puzzle, cell_px),
        f"images/level_{level}/{puzzle_id}_together.png": draw_square(puzzle.covered, cell_px),
    }
    for path, image in images.items():
        (folder / path).write_bytes(png_bytes(image))
    pieces, together = images
    return {
        "text_input": QUESTION,
        "image_input": pieces,
        "image_output": together,
        "text_output": ANSWER.format(letter=LETTERS[NUM_COVERED.index(len(puzzle.covered))]),
        "options": OPTIONS,
        "puzzle_id": puzzle_id,
        "level": level,
    }
