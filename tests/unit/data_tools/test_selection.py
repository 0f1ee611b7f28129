"""`mirage-data filter` and `split`: plain webdataset reads back the rows that plain Python chooses, bit for bit."""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from generated_rows import make_row, write_jsonl, write_rows

from data_tools import cli
from data_tools.build import build
from data_tools.check import check
from data_tools.count import count
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.hf.preset import write_tiny

NUM_ROWS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows in shards of 5: every third without a latent block, some with other fields."""
    place = tmp_path_factory.mktemp("selection")
    write_rows(place / "rows", NUM_ROWS)
    rows = [make_row(number) for number in range(NUM_ROWS)]
    for number, row in enumerate(rows):
        row |= {"level": number % 4, "name": f"map {number % 5}", "solved": number % 2 == 0, "score": number / 2}
        if number % 3 == 0:
            del row["image_output"]
            row["text_output"] = f"no block, {number}" + " and more" * number
    del rows[7]["level"]
    path = write_jsonl(place / "rows" / "rows.jsonl", rows)
    write_tiny(path, place / "model", seed=0)
    build(path, place / "shards", maxcount=5, maxsize=10**9)
    return place


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mirage-data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def members(folder: Path) -> dict[str, dict[str, Any]]:
    """By key, the members that plain webdataset reads."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    return {
        sample["__key__"]: {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in samples
    }


def fields(place: Path) -> dict[str, dict[str, Any]]:
    return {key: json.loads(each["json"]) for key, each in members(place / "shards").items()}


CHOICES: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "level=3": lambda key, row: row.get("level") == 3,
    "level != 3": lambda key, row: row.get("level") != 3,
    "level=null": lambda key, row: "level" not in row,
    "level>=2": lambda key, row: row.get("level", -1) >= 2,
    "score<2.5": lambda key, row: row["score"] < 2.5,
    "solved=true": lambda key, row: row["solved"],
    "name=map 3": lambda key, row: row["name"] == "map 3",
    "name~3": lambda key, row: "3" in row["name"],
    "text_output~boxed{B}": lambda key, row: "boxed{B}" in row["text_output"],
    "latent_blocks>=1": lambda key, row: "<output_image>" in row["text_output"],
    "helper_images=0": lambda key, row: "<output_image>" not in row["text_output"],
    "answer_chars>50": lambda key, row: len(row["text_output"]) > 50,
    "key<=000000004": lambda key, row: int(key) <= 4,
    "key<10": lambda key, row: int(key) < 10,
}


@pytest.mark.parametrize("where", CHOICES)
def test_filter_takes_the_rows_that_meet_a_condition(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Members are bit-equal, and the new folder has no fault."""
    expected = [key for key, row in fields(place).items() if CHOICES[where](key, row)]
    assert 0 < len(expected) < NUM_ROWS
    assert not run(
        monkeypatch, "filter", place / "shards", "--output", tmp_path / "out", "--where", where, "--maxcount", 2
    )
    old, new = members(place / "shards"), members(tmp_path / "out")
    assert list(new) == expected
    assert new == {key: old[key] for key in expected}
    assert not list(check(tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len({name.partition(".")[0] for name in tar.getnames()}) <= 2


def test_all_conditions_have_to_be_met_and_all_rows_give_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("--where", "level>=1", "--where", "latent_blocks=1")
    assert not run(monkeypatch, "filter", place / "shards", "--output", tmp_path / "two", *two)
    rows = fields(place).items()
    assert list(members(tmp_path / "two")) == [
        key for key, row in rows if row.get("level", 0) >= 1 and "<output_image>" in row["text_output"]
    ]
    every = ("--where", "input_images=1", "--maxcount", 5)
    assert not run(monkeypatch, "filter", place / "shards", "--output", tmp_path / "all", *every)
    paths = sorted(path.relative_to(tmp_path / "all") for path in (tmp_path / "all").rglob("*") if path.is_file())
    assert len(paths) > 4
    for path in paths:
        assert (tmp_path / "all" / path).read_bytes() == (place / "shards" / path).read_bytes(), path
    limit = (place / "shards" / "shard-000000.tar").stat().st_size // 3
    small = ("--where", "input_images=1", "--maxsize", limit)
    assert not run(monkeypatch, "filter", place / "shards", "--output", tmp_path / "small", *small)
    assert len(list((tmp_path / "small").glob("*.tar"))) > 3
    assert members(tmp_path / "small") == members(place / "shards")


def test_tokens_are_those_that_the_encoder_makes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    build(place / "rows" / "rows.jsonl", folder, maxcount=5, maxsize=10**9)
    settings = {"system_turn": True, "min_pixels": None, "max_pixels": None, "max_length": None, "cache_dir": None}
    count(folder, str(place / "model"), latent_size=3, **settings)
    encoder, read = (
        load_encoder(str(place / "model"), stage="stage1", latent_size=3),
        SampleReader(load_manifest(folder)),
    )
    lengths = [len(encoder(read(number)).input_ids) for number in range(NUM_ROWS)]
    middle = sorted(lengths)[NUM_ROWS // 2]
    options = ("--where", f"tokens<{middle}", "--model", place / "model", "--latent-size", 3)
    assert not run(monkeypatch, "filter", folder, "--output", tmp_path / "out", *options)
    assert [int(key) for key in members(tmp_path / "out")] == [
        number for number, length in enumerate(lengths) if length < middle
    ]


MISTAKES = {
    ("--where", "levle=3"): "no row has the field levle (--where 'levle=3'",
    ("--where", "level"): "not a condition (--where 'level'); allowed: FIELD, one of = != < <= > >= ~",
    ("--where", "level=high"): "level is 0 in the row (shard-000000.tar/000000000), which --where 'level=high' cannot",
    ("--where", "map_desc=1"): "map_desc is [[1, 0], [-1, 0]] in the row",
    ("--where", "solved>false"): "solved is true in the row",
    ("--where", "tokens<9"): "no model for tokens",
    ("--where", "tokens<9", "--model", "MODEL"): "the tokens were not counted for this model",
    ("--where", "level=9"): "no row for the output",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_leave_nothing(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    given = [str(place / "model") if each == "MODEL" else each for each in options]
    assert run(monkeypatch, "filter", place / "shards", "--output", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert MISTAKES[options] in error
    assert error.count(";") >= 2
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_gets_no_new_digest(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    build(place / "rows" / "rows.jsonl", folder, maxcount=5, maxsize=10**9)
    shard = folder / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    shard.write_bytes(data)
    options = ("--output", tmp_path / "out", "--where")
    assert run(monkeypatch, "filter", folder, *options, "key>=000000004") == 2
    assert "the shard has sha256 " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    assert not run(monkeypatch, "filter", folder, *options, "key<000000004")  # rows of an intact shard


def test_split_gives_every_row_to_one_output(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(name: str, *options: object, count: int = 2) -> list[dict[str, dict[str, Any]]]:
        outputs = [tmp_path / f"{name}{number}" for number in range(count)]
        given = [each for output in outputs for each in ("--output", output)]
        assert not run(monkeypatch, "split", place / "shards", *given, *options)
        parts = [members(output) for output in outputs]
        assert sum(len(part) for part in parts) == NUM_ROWS
        assert {key: each for part in parts for key, each in part.items()} == members(place / "shards")
        return parts

    first = split("halves", "--fractions", "0.5,0.5")
    assert first == split("again", "--fractions", "0.5,0.5")
    assert first != split("seed", "--fractions", "0.5,0.5", "--seed", 1)
    split("three", "--fractions", "0.4,0.3,0.3", count=3)
    by_name = split("name", "--fractions", "0.5,0.5", "--by", "name")
    names = [{json.loads(each["json"])["name"] for each in part.values()} for part in by_name]
    assert not names[0] & names[1]
    _, none = split("blocks", "--where", "latent_blocks>=1")
    assert list(none) == [f"{number:09d}" for number in range(0, NUM_ROWS, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "a", "--output", "b", "--fractions", "0.5,0.6"), "invalid fractions (--fractions 0.5,0.6)"),
        (("--output", "a", "--fractions", "0.5,0.5"), "cannot split into these outputs (--output given: 1"),
        (("--output", "a", "--output", "a", "--fractions", "0.5,0.5"), "all outputs different"),
        (("--output", "a", "--output", "b"), "a fraction for each output, or conditions and two outputs"),
        (("--output", "a", "--output", "b", "--fractions", "0.5,0.5", "--by", "colour"), "no row has the field colour"),
        (("--output", "a", "--output", "b", "--fractions", "0.999999,0.000001"), "no row for the output (b)"),
    ],
)
def test_splits_that_cannot_be(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "split", place / "shards", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options"),
    [("filter", ("--where", "input_images=1")), ("split", ("--output", "other", "--fractions", "0.5,0.5"))],
)
def test_no_data_set_is_written_into_another(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = place / "shards" / "new"
    assert run(monkeypatch, command, place / "shards", "--output", inside, *options) == 2
    message = f"the output is inside another folder of shards ({inside} in {place / 'shards'})"
    assert message in capsys.readouterr().err
    assert not inside.exists()
    assert not list(tmp_path.iterdir())


def test_what_is_no_key_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "filter", place / "shards", "--output", tmp_path / "new", "--where", "key<map") == 2
    assert "'map' is no key" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["stats", "head", "preview", "filter", "split", "count", "upgrade"])
def test_a_url_is_refused_as_it_was_written(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "http://127.0.0.1:1/shards") == 2
    message = capsys.readouterr().err
    assert "http://127.0.0.1:1/shards" in message
    assert "this command reads folders on a disk" in message
