"""`mirage-data count`: the counts give the lengths that the encoder makes; damaged and foreign files are refused."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from generated_rows import make_row, write_jsonl, write_rows

from data_tools import cli
from data_tools.build import build
from mirage_ds.data import counts as counts_file
from mirage_ds.data import images
from mirage_ds.data.costs import SampleCosts
from mirage_ds.data.counts import Counts, count_texts, counts_name, load_counts, save_counts
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.index import load_index
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError, DiskFullError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config
from mirage_ds.training.sample_costs import measure_samples

NUM_ROWS, K = 10, 3
RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and shards of rows with one block, none, two, no helper image, other scripts and sizes."""
    place = tmp_path_factory.mktemp("counts")
    rows = [make_row(number) for number in range(NUM_ROWS)]
    rows[1]["text_output"] = rows[1]["text_output"].replace("<output_image>", "")  # the block comes in front
    rows[2] |= {"text_output": "caf\u00e9 \u5730\u56fe, \\boxed{B}"}
    del rows[2]["image_output"]
    rows[3] |= {"text_input": "Which way?", "image_input": ["images/3_0.png", "images/4_0.png"]}
    rows[4] |= {
        "text_output": "First<output_image>then <output_image> and so on.",
        "image_output": ["images/4_1.png", "images/5_1.png"],
    }
    rows[5]["text_output"] = rows[5]["text_output"] + " and" * 40
    write_rows(place / "rows", NUM_ROWS)
    path = write_jsonl(place / "rows" / "rows.jsonl", rows)
    write_tiny(path, place / "model", seed=0)
    build(path, place / "shards", maxcount=4, maxsize=10**9)
    return place


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> ShardFolder:
    shutil.copytree(place / "shards", tmp_path / "shards")
    return load_manifest(tmp_path / "shards")


def open_encoder(place: Path, stage: str, *, system_turn: bool = True) -> Encoder:
    return load_encoder(str(place / "model"), stage=stage, latent_size=K, system_turn=system_turn)


def load(encoder: Encoder, folder: ShardFolder, stage: str, *, system_turn: bool = True) -> Counts | None:
    return load_counts(counts_name(encoder.tokenizer, system_turn=system_turn), folder, stage=stage)


def lengths_by_counts(folder: ShardFolder, encoder: Encoder, stage: str, *, system_turn: bool = True) -> list[int]:
    counts = load(encoder, folder, stage, system_turn=system_turn)
    assert counts is not None
    costs = SampleCosts(load_index(folder), encoder.image_tokens, stage, K, texts=counts)
    return costs.all().tokens.tolist()


@pytest.mark.parametrize("system_turn", [True, False])
@pytest.mark.parametrize("stage", ["text", "stage1"])
def test_counts_give_the_lengths_of_encoded_samples(
    place: Path, folder: ShardFolder, monkeypatch: pytest.MonkeyPatch, stage: str, system_turn: bool
) -> None:
    """Also where groups end; no image is decoded."""
    encoder, read = open_encoder(place, stage, system_turn=system_turn), SampleReader(folder)
    expected = [len(encoder(read(number)).input_ids) for number in range(NUM_ROWS)]
    assert load(encoder, folder, stage, system_turn=system_turn) is None
    monkeypatch.setattr(counts_file, "GROUP", 4)
    monkeypatch.setattr(images.Image, "open", lambda *_: pytest.fail("an image is decoded"))
    counts = count_texts(folder, encoder.tokenizer, system_turn=system_turn)
    save_counts(folder, encoder.tokenizer, counts, system_turn=system_turn)
    assert lengths_by_counts(folder, encoder, stage, system_turn=system_turn) == expected
    assert load(encoder, folder, stage, system_turn=not system_turn) is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mirage-data", "count", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_the_command_says_how_long_samples_are(
    place: Path, folder: ShardFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, folder.path, "--model", place / "model", "--latent-size", K)
    encoder = open_encoder(place, "stage1")
    lengths = lengths_by_counts(folder, encoder, "stage1")
    longest = max(lengths)
    assert lengths.index(longest) == 5
    wrote, text, latents = capsys.readouterr().out.splitlines()
    (path,) = folder.path.glob("*.npz")
    assert wrote == f"wrote {path}"
    middle = np.median(lengths)
    words = f"min {min(lengths)}, median {middle:g}, 95th percentile {longest}, max {longest}"
    assert latents == f"stage1 and stage2: tokens of a sample: {words}"
    assert text.startswith("text: tokens of a sample: min ")
    limit = sorted(lengths)[-2] - 1
    run(monkeypatch, folder.path, "--model", place / "model", "--latent-size", K, "--max-length", limit)
    *_, text, latents = capsys.readouterr().out.splitlines()
    second = lengths.index(limit + 1)
    expected = sorted([(second, limit + 1), (5, longest)])
    keys = [f"{folder.manifest.shards[entry.shard].name}/{entry.key}" for entry in load_index(folder)]
    listed = ", ".join(f"{keys[number]} with {length}" for number, length in expected)
    assert latents.endswith(f"max {longest}; over {limit}: 2 ({listed})")
    assert f"; over {limit}: " in text


def test_packing_needs_counts_and_room_for_every_sample(place: Path, folder: ShardFolder) -> None:
    """The log says whether the counts are used."""

    def read(budget: int | None) -> tuple[list[int], str]:
        packing = ["data.packing=true", f"data.token_budget={budget}"] if budget else []
        paths = [f"data.shards={folder.path}", f"model.path={place / 'model'}", f"model.latent_size={K}"]
        costs, source = measure_samples(load_config(RECIPE, [*paths, *packing]), encoder, folder)
        return costs.all().tokens.tolist(), source

    encoder = open_encoder(place, "stage1")
    path = folder.path / counts_name(encoder.tokenizer, system_turn=True)
    assert read(None)[1] == f"tokens estimated from characters (no {path})"
    expected = (
        rf"were not counted \(data\.shards={folder.path}, .*; run mirage-data count {folder.path} --model {place}"
    )
    with pytest.raises(DataError, match=expected):
        read(1000)
    save_counts(folder, encoder.tokenizer, count_texts(folder, encoder.tokenizer, system_turn=True), system_turn=True)
    lengths = lengths_by_counts(folder, encoder, "stage1")
    assert read(None) == read(max(lengths)) == (lengths, f"tokens counted ({path})")
    over = rf"data\.token_budget={max(lengths) - 1}: 1: shard-000001\.tar/000000005 with {max(lengths)}; "
    with pytest.raises(DataError, match=over + rf".*raise data\.token_budget to at least {max(lengths)}, "):
        read(max(lengths) - 1)


def saved(place: Path, folder: ShardFolder) -> tuple[Encoder, Path]:
    encoder = open_encoder(place, "stage1")
    counts = {name: np.full(NUM_ROWS, 7, np.int32) for name in ("without_latents", "with_latents")}
    return encoder, save_counts(folder, encoder.tokenizer, counts, system_turn=True)


@pytest.mark.parametrize("damage", ["cut off", "another byte", "empty", "no array"])
def test_damaged_counts_are_refused(place: Path, folder: ShardFolder, damage: str) -> None:
    encoder, path = saved(place, folder)
    data = bytearray(path.read_bytes())
    if damage == "another byte":
        data[data.rindex(np.full(NUM_ROWS, 7, np.int32).tobytes())] ^= 1
    path.write_bytes(
        {"cut off": data[: len(data) // 2], "empty": b"", "no array": b"some text"}.get(damage, bytes(data))
    )
    with pytest.raises(
        DataError, match=r"counts of tokens cannot be read: .*\.npz\); expected .*; remove it, and run "
    ):
        load(encoder, folder, "stage1")


def test_counts_of_other_shards_are_refused(place: Path, folder: ShardFolder, tmp_path: Path) -> None:
    encoder, path = saved(place, folder)
    build(place / "rows" / "rows.jsonl", tmp_path / "others", maxcount=3, maxsize=10**9)
    shutil.copy(path, tmp_path / "others")
    others = load_manifest(tmp_path / "others")
    expected = rf"are of other shards .* manifest {folder.digest:.12}, .* expected manifest {others.digest:.12}"
    with pytest.raises(DataError, match=expected):
        load(encoder, others, "stage1")


def test_counts_of_another_tokenizer_are_not_taken(place: Path, folder: ShardFolder) -> None:
    encoder, _ = saved(place, folder)
    assert load(encoder, folder, "stage1") is not None
    encoder.tokenizer.add_tokens(["another"])
    assert load(encoder, folder, "stage1") is None


def test_a_full_disk_leaves_nothing(place: Path, folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.path.iterdir())

    def fill(file, **arrays) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(counts_file.np, "savez", fill)
    with pytest.raises(DiskFullError, match="nothing was written; free some space, and count again"):
        saved(place, folder)
    assert sorted(folder.path.iterdir()) == before
