"""`mirage-data make-vsp`: against an independent search and enumeration, and the drawn pixels."""

import hashlib
import itertools
import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_vocabulary import real_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools import cli, vsp, vsp_images
from data_tools.build import build
from data_tools.vsp import PROMPTS, make_vsp, parse_levels, share_out
from data_tools.vsp_maps import draw_maps
from mirage_ds.data.encode import Encoder
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.tasks import vsp as scoring
from mirage_ds.evaluation.tasks.reasoning import extract_choice
from mirage_ds.hf.preset import train_tokenizer

__all__ = ["real_tokenizer"]

STEPS = {"LEFT": (0, -1), "RIGHT": (0, 1), "UP": (-1, 0), "DOWN": (1, 0)}
CELL_PX = 32
Cell = tuple[int, int]
MapDesc = list[list[int]]


def make(output: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "levels": range(3, 6),
        "num_train": 24,
        "num_test": 12,
        "cell_px": CELL_PX,
        "style": "planning",
        "prompt": "long",
        "seed": 1,
    }
    make_vsp(output, **arguments | changes)
    return output


def read(folder: Path, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def planning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("vsp") / "planning")


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("vsp") / "reasoning", style="reasoning", num_train=60)


def find(map_desc: MapDesc, kind: int) -> Cell:
    (cell,) = [(y, x) for y, row in enumerate(map_desc) for x, value in enumerate(row) if value == kind]
    return cell


def distance(map_desc: MapDesc) -> int | None:
    """Moves from start to goal: rings of cells around the start."""
    free = {(y, x) for y, row in enumerate(map_desc) for x, value in enumerate(row) if value != -1}
    ring, seen = {find(map_desc, 1)}, set()
    for moves in range(len(map_desc) ** 2):
        if find(map_desc, 2) in ring:
            return moves
        seen |= ring
        ring = {(y + dy, x + dx) for y, x in ring for dy, dx in STEPS.values()} & free - seen
    return None


def cells_of(map_desc: MapDesc, moves: list[str]) -> list[Cell]:
    cells = [find(map_desc, 1)]
    for move in moves:
        y, x = (place + change for place, change in zip(cells[-1], STEPS[move], strict=True))
        cells.append((y, x) if 0 <= y < len(map_desc) and 0 <= x < len(map_desc) else cells[-1])
    return cells


def differing_cells(folder: Path, row: dict[str, Any]) -> set[Cell]:
    """The cells in which the helper image differs from the input image."""
    images = [np.asarray(Image.open(folder / row[name])) for name in ("image_input", "image_output")]
    assert images[0].shape == images[1].shape == (CELL_PX * row["level"], CELL_PX * row["level"], 3)
    different = (images[0] != images[1]).any(axis=2).reshape(row["level"], CELL_PX, row["level"], CELL_PX)
    return {(int(y), int(x)) for y, x in np.argwhere(different.any(axis=(1, 3)))}


def every_map(level: int) -> list[MapDesc]:
    """All squares of 0, -1, one 1 and one 2 that have a path, enumerated value by value."""
    values = itertools.product((-1, 0, 1, 2), repeat=level**2)
    single = (cells for cells in values if cells.count(1) == cells.count(2) == 1)
    squares = ([list(cells[row * level : (row + 1) * level]) for row in range(level)] for cells in single)
    return [square for square in squares if distance(square) is not None]


def test_every_solvable_map_of_level_3_can_be_drawn() -> None:
    sides = {side: draw_maps(3, side, vsp.num_available(3, side), seed=5) for side in ("train", "test")}
    drawn = [json.dumps(map_desc) for maps in sides.values() for map_desc in maps]
    assert len(drawn) == len(set(drawn)) == 6792
    assert set(drawn) == {json.dumps(map_desc) for map_desc in every_map(3)}
    assert len(sides["test"]) >= 200
    assert len(sides["train"]) > 5000


@pytest.mark.parametrize("level", [3, 4, 6])
def test_the_map_alone_decides_its_side(level: int) -> None:
    """So no seed, number or level can put a test map into training."""
    for seed in (0, 1):
        for side, ending in (("test", {0}), ("train", set(range(1, 10)))):
            for map_desc in draw_maps(level, side, 100, seed):
                digest = hashlib.sha256(json.dumps(map_desc).encode()).hexdigest()
                assert int(digest, 16) % 10 in ending
                assert distance(map_desc)


@pytest.mark.parametrize("style", ["planning", "reasoning"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, style: str) -> None:
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        make(tmp_path / name, style=style, seed=seed, num_train=9, num_test=3)
    one, same, other = (file_bytes(tmp_path / name) for name in ("one", "same", "other"))
    assert len(one) == 2 + 2 * 12
    assert one == same
    assert one["train.jsonl"] != other["train.jsonl"]
    assert one["test.jsonl"] != other["test.jsonl"]


@pytest.mark.parametrize("style", ["planning", "reasoning"])
def test_rows_have_the_references_fields_and_their_own_maps(request: pytest.FixtureRequest, style: str) -> None:
    folder = request.getfixturevalue(style)
    train, test = read(folder, "train"), read(folder, "test")
    assert Counter(row["level"] for row in test) == {3: 4, 4: 4, 5: 4}
    maps = [json.dumps(row["map_desc"]) for row in train + test]
    assert len(set(maps)) == len({row["map_id"] for row in train + test}) == len(train) + 12
    names = {"text_input", "image_input", "image_output", "text_output", "map_desc", "map_id", "level"}
    for row in train + test:
        assert set(row) == names
        assert len(row["map_desc"]) == row["level"]
        assert row["text_input"].count("<image>") == 1
        for name in ("image_input", "image_output"):
            assert row[name].startswith("images/")
            assert (folder / row[name]).read_bytes().startswith(b"\x89PNG")


def test_answers_and_drawn_paths_are_shortest_ones(planning: Path) -> None:
    for row in read(planning, "train") + read(planning, "test"):
        text, map_desc = row["text_output"], row["map_desc"]
        assert text.startswith("\\boxed{")
        moves = text.removeprefix("\\boxed{").removesuffix("}").split(", ")
        cells = cells_of(map_desc, moves)
        assert len(moves) == distance(map_desc)
        assert cells[-1] == find(map_desc, 2)
        assert not any(map_desc[y][x] == -1 for y, x in cells)
        assert differing_cells(planning, row) == set(cells)
        assert scoring.score(map_desc, text, "strict").success
        assert scoring.score(map_desc, text, "reference").success


def test_cells_are_drawn_by_kind(planning: Path) -> None:
    """Cells of the same kind are equal pixel by pixel, and cells of different kinds differ."""
    looks: dict[int, set[bytes]] = {}
    for row in read(planning, "test"):
        pixels = np.asarray(Image.open(planning / row["image_input"]))
        for y, x in itertools.product(range(row["level"]), repeat=2):
            cell = pixels[y * CELL_PX : (y + 1) * CELL_PX, x * CELL_PX : (x + 1) * CELL_PX]
            looks.setdefault(row["map_desc"][y][x], set()).add(cell.tobytes())
    assert sorted(looks) == [-1, 0, 1, 2]
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == 4


def test_a_tile_is_the_sprite(tmp_path: Path) -> None:
    """At the original size of the sprites, the pixels inside the grid lines are those of the sprite."""
    folder = make(tmp_path / "vsp", levels=range(3, 4), cell_px=64)
    row = next(row for row in read(folder, "train") if -1 in row["map_desc"][0])
    left = 64 * row["map_desc"][0].index(-1)
    spec = find_spec("gymnasium")
    assert spec is not None
    sprite = Path(str(spec.origin)).parent / "envs" / "toy_text" / "img" / "tile_hole.png"
    tile = Image.open(folder / row["image_input"]).crop((left, 0, left + 64, 64))
    inner = (1, 1, 63, 63)
    assert tile.crop(inner).tobytes() == Image.open(sprite).convert("RGB").crop(inner).tobytes()


def test_the_outcomes_of_plans_match_the_answers(reasoning: Path) -> None:
    rows = read(reasoning, "train")
    outcomes = Counter(extract_choice(row["text_output"]) for row in rows)
    assert outcomes == {"A": 20, "B": 20, "C": 20}
    for row in rows + read(reasoning, "test"):
        map_desc = row["map_desc"]
        line = next(line for line in row["text_input"].splitlines() if line.startswith("The player makes these moves:"))
        moves = line.partition(": ")[2].split(", ")
        cells = cells_of(map_desc, moves)
        kinds = [map_desc[y][x] for y, x in cells]
        letter = {2: "A", -1: "B", 0: "C", 1: "C"}[kinds[-1]]
        assert row["text_output"].endswith(f"The answer is \\boxed{{{letter}}}.")
        assert not {2, -1} & set(kinds[:-1]), "no plan continues after the goal or a hole"
        assert scoring.simulate(map_desc, moves).success == (letter == "A")


def test_helper_images_show_the_step_between_the_thoughts(reasoning: Path) -> None:
    for row in read(reasoning, "train"):
        before, after = row["text_output"].split("<output_image>")
        for thought in (before, after.removesuffix(after[after.index("The answer") :])):
            assert thought.startswith("<think> ")
            assert thought.endswith(" </think>")
        plan = row["text_input"].partition("moves: ")[2].splitlines()[0].split(", ")
        cells = cells_of(row["map_desc"], plan)
        seen = before.count(" leads to ")
        assert seen >= 1
        assert seen + after.count(" leads to ") == len(plan)
        # The player has moved from the start to the cell of that step; nothing else changes.
        moved = {cells[0], cells[seen]} if cells[seen] != cells[0] else set()
        assert differing_cells(reasoning, row) == moved


@pytest.mark.parametrize("style", ["planning", "reasoning"])
def test_rows_build_and_encode(request: pytest.FixtureRequest, tmp_path: Path, style: str) -> None:
    folder = request.getfixturevalue(style)
    build(folder / "train.jsonl", tmp_path / "shards", maxcount=100, maxsize=10**9)
    rows = read(folder, "train")
    tokenizer = train_tokenizer(row["text_input"] + row["text_output"] for row in rows)
    processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056))
    reader = SampleReader(load_manifest(tmp_path / "shards"))
    for number, row in enumerate(rows):
        encoded = Encoder(tokenizer, processor, stage="stage1", latent_size=4)(reader(number))
        text = tokenizer.decode(encoded.input_ids[encoded.prompt_length :])
        latents_first = text.startswith("\n<|latent_start|>")
        assert latents_first == (style == "planning")
        assert encoded.latent_mask.sum() == 4
        assert row["text_output"].rpartition("\\boxed")[2] in text


def test_cells_of_28_pixels_are_one_merged_token_each(tmp_path: Path) -> None:
    folder = make(tmp_path / "vsp", cell_px=28)
    processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056))
    for row in read(folder, "test"):
        _, grid_thw = processor([Image.open(folder / row[name]) for name in ("image_input", "image_output")])
        assert processor.num_merged(grid_thw) == [row["level"] ** 2] * 2


def test_short_prompts_are_short(real_tokenizer: PreTrainedTokenizerBase) -> None:
    for (_, length), prompt in PROMPTS.items():
        words = prompt.replace("{plan}", "").replace("<image>", "<|image_pad|>")
        assert (len(real_tokenizer(words)["input_ids"]) <= 16) == (length == "short")


def test_levels_share_the_available_maps() -> None:
    assert share_out(10, range(3, 7), "test") == {3: 2, 4: 2, 5: 3, 6: 3}
    assert share_out(10_000, range(2, 5), "train") == {2: 41, 3: 4979, 4: 4980}
    assert share_out(20_000, range(2, 5), "train") == {2: 41, 3: 6115, 4: 13844}
    assert sum(vsp.num_available(2, side) for side in ("train", "test")) == len(every_map(2))


@pytest.mark.parametrize(
    ("num_train", "num_test", "message"),
    [
        (6793, 1, r"too many maps .*\(--num-train 6793\); levels 3-3 have 6115"),
        (1, 678, r"too many maps .*\(--num-test 678\); levels 3-3 have 677"),
    ],
)
def test_more_maps_than_exist(tmp_path: Path, num_train: int, num_test: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path / "vsp", levels=range(3, 4), num_train=num_train, num_test=num_test)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1", "6-3", "3-", "-3", "a", "3-6-8", "3,4"])
def test_invalid_levels(text: str) -> None:
    with pytest.raises(ConfigError, match="--levels"):
        parse_levels(text)


def test_levels() -> None:
    assert (list(parse_levels("3")), list(parse_levels("3-6"))) == ([3], [3, 4, 5, 6])


def test_gymnasium_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsp_images, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mirage_ds\[vsp\]'"):
        make(tmp_path / "vsp")
    monkeypatch.setattr(vsp_images, "find_spec", find_spec)
    monkeypatch.setattr(vsp_images, "SPRITES", ("no_such_sprite",))
    with pytest.raises(ConfigError, match=r"no_such_sprite.*gymnasium 1\.4"):
        make(tmp_path / "vsp")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["make-vsp", "--output", str(tmp_path / "vsp"), "--num-train", "8", "--num-test", "1", "--levels", "3"]
    for code in (0, 2):  # the second time the output exists
        monkeypatch.setattr(sys, "argv", ["mirage-data", *arguments, "--style", "reasoning", "--prompt", "short"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == code
    output = capsys.readouterr()
    assert output.out.startswith("wrote 8 training rows and 1 test row to ")
    assert "the output already exists" in output.err
    assert read(tmp_path / "vsp", "train")[0]["text_input"].startswith("<image> Goal A")
