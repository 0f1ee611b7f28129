"""Rows of several turns: what is read, written into shards, and refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import conversation_rows
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from conversation_rows import ROWS, write_conversations
from generated_rows import image_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build import build
from data_tools.check import check
from mirage_ds.data.rows import Sample, read_row, read_rows
from mirage_ds.data.shard_samples import from_members, to_members
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.data.turns import Turn
from mirage_ds.errors import DataError

TURNS = ROWS[0]["conversations"]
PNG = image_bytes((56, 56))
IMAGES = ("image_input", "image_output")
NAMES = ("text_input", "text_output")


def said(*values: str) -> list[dict[str, str]]:
    """Questions and answers in turn."""
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def read(tmp_path: Path, row: dict[str, Any]) -> Sample:
    for name, size in conversation_rows.SIZES.items():
        (tmp_path / name).write_bytes(image_bytes(size))
    return read_row(row, key="k", where="rows.jsonl:7", folder=tmp_path)


@pytest.mark.parametrize(
    ("value", "trained"),
    [
        (None, [False, False, True]),
        ("last", [False, False, True]),
        ("all", [True, True, True]),
        ([2], [False, False, True]),
        ([2, 0], [True, False, True]),
    ],
)
def test_which_answers_are_trained(tmp_path: Path, value: Any, trained: list[bool]) -> None:
    sample = read(tmp_path, {"conversations": said("a", "b", "c", "d", "e", "f"), "train_answers": value, "id": 1})
    assert [turn.train for turn in sample.turns if turn.role == "gpt"] == trained
    assert sample.context == (
        *(Turn("human", "a"), Turn("gpt", "b", trained[0])),
        *(Turn("human", "c"), Turn("gpt", "d", trained[1])),
    )
    assert (sample.text_input, sample.text_output, sample.extra) == ("e", "f", {"id": 1})


def test_the_row_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith('{"conversations"'))
    row = json.loads(line)
    for name in (*row["image_input"], *row["image_output"]):
        (tmp_path / name).write_bytes(PNG)
    sample = read(tmp_path, row)
    assert [(turn.role, turn.train) for turn in sample.turns] == [("human", False), ("gpt", True)] * 2
    assert (len(sample.input_images), len(sample.helper_images)) == (2, 2)


def test_plain_webdataset_reads_the_conversations_back(tmp_path: Path) -> None:
    rows = write_conversations(tmp_path / "rows")
    build(rows, tmp_path / "shards", maxcount=2, maxsize=10**9)
    folder, read_back = load_manifest(tmp_path / "shards"), []
    for shard in sorted(folder.path.glob("*.tar")):
        read_back += list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(read_back) == len(ROWS)
    for found, row in zip(read_back, ROWS, strict=True):
        fields = json.loads(found["json"])
        assert fields["conversations"] == row["conversations"]
        train = row.get("train_answers")
        assert fields.get("train_answers") == ([0, 1] if train == "all" else train)
        assert fields.get("latent_size") == row.get("latent_size")
        images = {"input": row["image_input"], "helper": row["image_output"]}
        for kind, names in images.items():
            for number, name in enumerate([names] if isinstance(names, str) else names):
                assert found[f"{kind}_{number}.png"] == (rows.parent / name).read_bytes()
    samples = [sample for _, sample in read_rows(rows)]
    assert [replace(SampleReader(folder)(number), key="") for number in range(len(ROWS))] == [
        replace(sample, key="") for sample in samples
    ]
    assert list(check(folder.path)) == []


def test_parquet_gives_the_shards_of_jsonl(tmp_path: Path) -> None:
    """Its columns are those of all rows: what a row has not is null there, which counts as missing."""
    one_turn = {"text_input": "Q", "text_output": "A"}
    jsonl = write_conversations(tmp_path / "rows", [*ROWS, one_turn])
    lists = [{**row, **{name: [row[name]] for name in IMAGES if isinstance(row.get(name), str)}} for row in ROWS]
    lists[0]["train_answers"] = [0, 1]
    names = dict.fromkeys(name for row in (*lists, one_turn) for name in row)
    table = pyarrow.table({name: [row.get(name) for row in (*lists, one_turn)] for name in names})
    pyarrow.parquet.write_table(table, jsonl.with_suffix(".parquet"))
    for path in (jsonl, jsonl.with_suffix(".parquet")):
        build(path, tmp_path / path.suffix, maxcount=9, maxsize=10**9)
    files = [path.name for path in (tmp_path / ".jsonl").iterdir() if path.is_file()]
    assert "shard-000000.tar" in files
    for name in files:
        assert (tmp_path / ".parquet" / name).read_bytes() == (tmp_path / ".jsonl" / name).read_bytes()


@st.composite
def conversations(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    """A row, and how many input and helper images its slots need."""
    num_answers = draw(st.integers(1, 4))
    last = num_answers - 1
    train, trained = draw(
        st.sampled_from([(None, {last}), ("last", {last}), ("all", set(range(num_answers)))])
        | st.sets(st.integers(0, last)).map(lambda numbers: (sorted({*numbers, last}), {*numbers, last}))
    )
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="<")
    words = st.text(letters, min_size=1, max_size=5)
    tags = st.integers(0, 2)
    turns, inputs, helpers = [], 0, 0
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(words)})
    for number in range(num_answers):
        for role in ("human", "gpt"):
            is_trained = role == "gpt" and number in trained
            repeated = draw(tags)
            value = ("<output_image>" if is_trained else "<image>") * repeated + draw(words)
            inputs, helpers = inputs + (not is_trained) * repeated, helpers + is_trained * repeated
            turns.append({"from": role, "value": value})
    return {"conversations": turns} | ({} if train is None else {"train_answers": train}), inputs, helpers


@given(conversations())
@settings(max_examples=100)
def test_random_conversations_survive_their_shard(drawn: tuple[dict[str, Any], int, int]) -> None:
    row, inputs, helpers = drawn
    images = {"image_input": [{"bytes": PNG}] * inputs, "image_output": [{"bytes": PNG}] * helpers}
    sample = read_row(row | images, key="k", where="here", folder=Path())
    members = to_members(sample)
    assert from_members("k", members) == sample
    fields = json.loads(members["json"])
    if len(row["conversations"]) > 2:
        assert fields["conversations"] == row["conversations"]
        assert read_row(fields | images, key="k", where="here", folder=Path()) == sample
    else:  # one turn is what it always was
        assert fields == {name: turn["value"] for name, turn in zip(NAMES, row["conversations"], strict=True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_input": "Q"}, r"has conversations and text_input .*allowed: .*; remove one"),
        ({"conversations": "Q"}, r"conversations is 'Q' .*expected a list of turns"),
        ({"conversations": []}, r"conversations is \[\] "),
        ({"conversations": [*TURNS, {"role": "user"}]}, r"conversations\[5\] is \{'role': 'user'\} .*expected .* from"),
        ({"conversations": [{"from": "user", "value": "Q"}]}, r"conversations\[0\] is .*\(system, human or gpt\)"),
        ({"conversations": [{"from": "human", "value": ""}]}, r"conversations\[0\] is .*non-empty text"),
        ({"conversations": [TURNS[1] | {"weight": 0}]}, r"conversations\[0\] is .*nothing else"),
        ({"conversations": TURNS[:4]}, r"the turns are from system, human, gpt, human .*at the end gpt"),
        ({"conversations": TURNS[2:]}, r"the turns are from gpt, human, gpt "),
        ({"conversations": [TURNS[0], *TURNS]}, r"the turns are from system, system, human"),
        ({"conversations": [TURNS[0]]}, r"the turns are from system "),
        ({"train_answers": [0]}, r"train_answers is \[0\] .*answers: 2; allowed: .* from 0 to 1 that has 1"),
        ({"train_answers": [1, 2]}, r"train_answers is \[1, 2\]"),
        ({"train_answers": [True]}, r"train_answers is \[True\]"),
        ({"train_answers": "first"}, r"train_answers is 'first'"),
        ({"train_answers": "last"}, r"conversations\[2\] contains <output_image> .*, but is no trained answer"),
        ({"latent_size": [2, 3]}, r"numbers in latent_size: 2, latent blocks of the row: 3"),
        ({"image_input": "six.png"}, r"image slots in conversations: 2, input images: 1"),
        ({"image_output": ["six.png"]}, r"<output_image> slots in trained answers: 3, helper images: 1"),
        ({"conversations": said("a <output_image>", "b", "c", "d")}, r"conversations\[0\] contains <output_image>"),
        ({"conversations": said("a", "b <image>", "c", "d")}, r"conversations\[1\] contains <image> "),
        ({"conversations": said("a", "b", "c <|im_end|>", "d")}, r"conversations\[2\] contains <\|im_end\|>"),
        ({"conversations": [{"from": "system", "value": "<image>"}, *TURNS[1:]]}, r"contains <image> .* from system"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path, ROWS[0] | change)
    assert "(rows.jsonl:7" in str(refused.value)
    assert len(str(refused.value).split(";")) >= 2
