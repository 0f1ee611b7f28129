"""Generated puzzles: every answer is found again from the pixels of the images; no test puzzle is in training."""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools import cli
from data_tools.build import build
from data_tools.puzzle_pieces import LEVELS, NUM_COVERED, Puzzle, draw_puzzles
from data_tools.puzzles import make_puzzles
from mirage_ds.data.encode import Encoder
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.hf.preset import train_tokenizer

CELL_PX = 28
SHAPE = (3, 3)
NUM_PIECES = {1: 3, 2: 3, 3: 4, 4: 4}
SIZES = {3: {(3, 3, 3)}, 4: {(2, 3, 2, 3), (3, 2, 3, 2)}}


def make(output: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"levels": range(1, 5), "num_train": 160, "num_test": 32, "cell_px": CELL_PX, "seed": 1}
    make_puzzles(output, **arguments | changes)
    return output


def read(folder: Path, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("puzzles") / "rows")


def pixels(folder: Path, path: str) -> np.ndarray:
    return np.asarray(Image.open(folder / path).convert("RGB")).astype(int)


def cells_of(square: np.ndarray) -> np.ndarray:
    """[3, 3] bool: the cells whose centre is more blue than red."""
    centres = square[CELL_PX // 2 :: CELL_PX, CELL_PX // 2 :: CELL_PX]
    assert centres.shape == (*SHAPE, 3)
    return np.asarray(centres[..., 2] > centres[..., 0] + 50)


def red_edge(square: np.ndarray) -> int:
    """0 top, 1 right, 2 bottom, 3 left: the edge whose middle is red; no other one is."""
    middle, last = len(square) // 2, len(square) - 1
    places = [square[1, middle], square[middle, last - 1], square[last - 1, middle], square[middle, 1]]
    (edge,) = [number for number, (red, green, _) in enumerate(places) if red > 200 and green < 60]
    return edge


def upright_pieces(folder: Path, row: dict[str, Any]) -> list[np.ndarray]:
    """The pieces of the question's image, turned as the question says."""
    image = pixels(folder, row["image_input"])
    squares = [image[:, start : start + 3 * CELL_PX] for start in range(0, image.shape[1], 4 * CELL_PX)]
    assert len(squares) == NUM_PIECES[row["level"]]
    return [np.rot90(cells_of(square), red_edge(square)) for square in squares]  # against the clock: edge to the top


def answer_of(row: dict[str, Any]) -> int:
    """The number that the answer's letter stands for."""
    match = re.fullmatch(r"Together: <output_image>\\boxed\{([A-D])\}", row["text_output"])
    assert match
    option = row["options"]["ABCD".index(match[1])]
    assert f"{match[1]} {option.removesuffix(' cells')}" in row["text_input"]
    return int(option.removesuffix(" cells"))


def test_the_pixels_give_the_picture_and_the_answer(puzzles: Path) -> None:
    for row in read(puzzles, "train") + read(puzzles, "test"):
        together = np.any(upright_pieces(puzzles, row), axis=0)
        helper = pixels(puzzles, row["image_output"])
        assert helper.shape == (3 * CELL_PX, 3 * CELL_PX, 3)
        assert np.array_equal(cells_of(helper), together)
        assert together.sum() == answer_of(row)


def test_the_sizes_of_the_pieces(puzzles: Path) -> None:
    """The red line hides no cell, and each of the sizes is as frequent for each answer."""
    found: Counter[tuple[int, tuple[int, ...], int]] = Counter()
    for row in read(puzzles, "train"):
        sizes = tuple(int(piece.sum()) for piece in upright_pieces(puzzles, row))
        assert sizes in SIZES[len(sizes)]
        found[row["level"], sizes, answer_of(row)] += 1
    assert all(found[level, sizes, NUM_COVERED[0]] == count for (level, sizes, _), count in found.items())


def without_turning(puzzle: Puzzle) -> frozenset[int]:
    """The cells that the pieces cover as they are drawn."""
    return frozenset(cell for piece in puzzle.drawn for cell in piece)


GUESSES: dict[str, Callable[[Puzzle], Hashable]] = {
    "cells covered without turning": lambda puzzle: len(without_turning(puzzle)),
    "shape covered without turning": without_turning,
    "first piece": lambda puzzle: puzzle.drawn[0],
    "turns": lambda puzzle: puzzle.turns,
    "sizes and cells covered without turning": lambda puzzle: (
        *map(len, puzzle.upright),
        len(without_turning(puzzle)),
    ),
}


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_seen_without_turning_tells_hardly_more_than_chance(level: int) -> None:
    """Of each thing that is seen, the most frequent answer in training is right in about 25% of the test."""
    train, test = draw_puzzles(level, "train", 1600, seed=0), draw_puzzles(level, "test", 400, seed=0)
    for name, seen in GUESSES.items():
        answers: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for puzzle in train:
            answers[seen(puzzle)][len(puzzle.covered)] += 1
        best = {key: counts.most_common(1)[0][0] for key, counts in answers.items()}
        rate = sum(best.get(seen(puzzle)) == len(puzzle.covered) for puzzle in test) / len(test)
        assert rate < 0.32, f"{name}: {rate:.1%}"


def test_pieces_are_never_all_turned_alike() -> None:
    for level in LEVELS:
        assert all(len(set(puzzle.turns)) > 1 for puzzle in draw_puzzles(level, "train", 40, seed=0))


def test_answers_are_balanced(puzzles: Path) -> None:
    for side, count in (("train", 10), ("test", 2)):
        found = Counter((row["level"], answer_of(row)) for row in read(puzzles, side))
        assert found == dict.fromkeys(itertools.product((1, 2, 3, 4), NUM_COVERED), count)


def test_no_test_pieces_in_training(tmp_path: Path) -> None:
    """Whatever the seeds: the upright pieces, in any order, decide the side, and each drawn image comes once."""
    found: dict[str, set[str]] = {"train": set(), "test": set()}
    for seed in (0, 1):
        folder = make(tmp_path / f"{seed}", levels=range(2, 3), num_train=400, num_test=200, seed=seed)
        for side, together in found.items():
            rows = read(folder, side)
            assert len({pixels(folder, row["image_input"]).tobytes() for row in rows}) == len(rows)
            for row in rows:
                pieces = sorted(np.flatnonzero(piece).tolist() for piece in upright_pieces(folder, row))
                assert (int(hashlib.sha256(json.dumps(pieces).encode()).hexdigest(), 16) % 10 == 0) == (side == "test")
                together.add(json.dumps(pieces))
    assert found["train"].isdisjoint(found["test"])
    assert len(found["test"]) > 100


def test_levels_1_and_3_have_half_turns_only(puzzles: Path) -> None:
    edges: dict[int, set[int]] = {level: set() for level in LEVELS}
    for row in read(puzzles, "train"):
        image = pixels(puzzles, row["image_input"])
        edges[row["level"]] |= {red_edge(image[:, start : start + 3 * CELL_PX]) for start in (0, 4 * CELL_PX)}
    assert edges == {1: {0, 2}, 2: {0, 1, 2, 3}, 3: {0, 2}, 4: {0, 1, 2, 3}}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        make(tmp_path / name, seed=seed, num_train=9, num_test=3)
    one, same, other = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "same", "other")
    )
    assert len(one) == 2 + 2 * 12
    assert one == same
    assert one["train.jsonl"] != other["train.jsonl"]
    assert one["test.jsonl"] != other["test.jsonl"]


def test_rows_build_and_encode(puzzles: Path, tmp_path: Path) -> None:
    """A cell is a merged token; the latents stand where the picture belongs, and text rows have no trace of it."""
    build(puzzles / "train.jsonl", tmp_path / "shards", maxcount=100, maxsize=10**9)
    rows = read(puzzles, "train")
    tokenizer = train_tokenizer(row["text_input"] + row["text_output"] for row in rows)
    processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056))
    reader = SampleReader(load_manifest(tmp_path / "shards"))
    for number, row in enumerate(rows):
        sample = reader(number)
        encoded = Encoder(tokenizer, processor, stage="stage1", latent_size=9)(sample)
        assert encoded.latent_mask.sum() == 9
        assert encoded.image_mask.sum() == 3 * (4 * NUM_PIECES[row["level"]] - 1)
        answer = tokenizer.decode(encoded.input_ids[encoded.prompt_length :])
        assert re.search(r"Together: \s*<\|latent_start\|>.*<\|latent_end\|>.*\\boxed\{[A-D]\}", answer, re.DOTALL)
        text = Encoder(tokenizer, processor, stage="text", latent_size=9)(sample)
        assert tokenizer.decode(text.input_ids[text.prompt_length :]).startswith("\nTogether: \\boxed{")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"levels": range(2, 6)}, ConfigError, r"no level 5 \(--levels 2-5\); allowed are 1 to 4"),
        ({"num_train": 80_001}, DataError, r"too many .*\(--num-train 80001, 20001 of level 1\); .* at most 20000"),
        ({"num_test": 8001}, DataError, r"too many .*\(--num-test 8001, 2001 of level 1\); .* at most 2000"),
    ],
)
def test_what_does_not_exist(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path / "rows", **changes)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["make-puzzles", "--output", str(tmp_path / "rows"), "--num-train", "8", "--num-test", "1"]
    for code in (0, 2):  # the second time the output exists
        monkeypatch.setattr(sys, "argv", ["mirage-data", *arguments, "--levels", "3"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == code
    output = capsys.readouterr()
    assert output.out.startswith("wrote 8 training rows and 1 test row to ")
    assert "the output already exists" in output.err
    assert {row["level"] for row in read(tmp_path / "rows", "train")} == {3}
