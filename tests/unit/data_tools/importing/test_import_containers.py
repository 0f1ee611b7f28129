"""Rows in JSON lists, CSV, parquet and folders of datasets. Against json's, csv's and pyarrow's own readers."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from imported import png

from data_tools.importing import json_lists
from data_tools.importing.containers import files_of, read_rows
from data_tools.importing.source_rows import to_picture
from mirage_ds.errors import DataError

VALUES: list[dict[str, Any]] = [
    {"text": 'a "quoted" [bracket] \\ {brace}', "list": [1, [2, {"x": "]"}]], "empty": {}},
    {"text": "\u0416\u2691\U0001f600", "long": "y" * 5000},
    {},
    {"text": "backslash at the end \\\\", "number": -1.5e3, "null": None},
]


def contents(path: Path) -> list[Any]:
    return [row.content if isinstance(row.content, dict) else json.loads(row.content) for row in read_rows([path])]


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_list_is_read_as_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, ascii_only: bool
) -> None:
    """Wherever the pieces end in which it is read."""
    monkeypatch.setattr(json_lists, "_CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8" if chunk > 1 else "utf-8-sig")
    monkeypatch.setattr("data_tools.importing.containers.is_list", lambda _: True)  # it looks at one piece
    assert [json.loads(element.content) for element in json_lists.elements(path)] == VALUES
    if indent is not None:
        lines = text.splitlines()
        assert [lines[element.line - 1].strip() for element in json_lists.elements(path)] == ["{", "{", "{},", "{"]
    assert [row.where.rpartition(", ")[2] for row in read_rows([path])] == ["row 0", "row 1", "row 2", "row 3"]
    assert list(read_rows([path]))[-1].fraction == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": "x', "the end of an element is missing (PATH:1)"),
        ('[{"a": 1}', "its end is missing (PATH:1)"),
        ('[{"a": 1}\n\n{"a": 2}]', "b'{' instead of b',' or b']' (PATH:3)"),
        ('[{"a": 1}, 5]', "an element that begins with b'5' (PATH:1)"),
        ('[{"a": 1}] x', "b'x' after its end (PATH:1)"),
    ],
)
def test_json_that_is_no_list_of_objects(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        contents(path)
    assert message.replace("PATH", str(path)) in str(caught.value)


def test_an_element_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "_MAX_ELEMENT_BYTES", 10_000)
    monkeypatch.setattr(json_lists, "_CHUNK_BYTES", 100)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(DataError, match="an element of more than 10000 bytes, or one that does not end"):
        contents(path)


def test_a_row_per_line_in_a_file_called_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(value) + "\n" for value in VALUES))
    assert contents(path) == VALUES
    assert [row.where for row in read_rows([path])] == [f"{path}:{line}" for line in (1, 2, 3, 4)]


def test_a_file_that_ends_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(value) + "\n" for value in VALUES)
    path.write_text(text[:-1])
    assert contents(path) == VALUES
    path.write_text(text[:-9])
    with pytest.raises(DataError, match=rf"the file ends in the middle of a row \({path}:4\)"):
        contents(path)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, delimiter: str) -> None:
    """With fields longer than csv's usual limit, and line breaks in them."""
    rows = [{"a": 'x, "y"\nz', "b": "1"}, {"a": "i" * 200_000, "b": "2"}]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["a", "b"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows([*rows, {"a": "", "b": "3"}])
    path = tmp_path / f"rows{suffix}"
    path.write_text(buffer.getvalue(), encoding="utf-8-sig")
    assert contents(path) == [*rows, {"b": "3"}]


def saved_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """As save_to_disk of Hugging Face's datasets writes it (datasets 4, arrow_dataset.py): two files here."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True):
        table = pyarrow.Table.from_pylist(part, schema=pyarrow.Table.from_pylist(rows).schema)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    rows = [
        {"number": number, "image": {"bytes": png(), "path": None}, "text": "x" if number % 2 else None}
        for number in range(150)
    ]
    folder = saved_folder(tmp_path / "train", rows)
    found = list(read_rows(files_of([str(folder)])))
    assert [row.content for row in found] == [
        {name: value for name, value in row.items() if value is not None} for row in rows
    ]
    assert found[75].where == f"{folder / 'data-00001-of-00002.arrow'}, row 0"
    assert [row.fraction for row in found] == sorted(row.fraction for row in found)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert files_of([str(tmp_path)]) == files_of([str(folder)])


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/train.json", "b/train.json", "b/1.png"), ""),
        (("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"), ""),
        (("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "several splits in the folder"),
        (("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"), "several splits in the folder"),
        (("train.json", "val.json"), "several splits in the folder"),
        (("a.json", "b.parquet"), "files of different kinds in the folder"),
        (("1.png", "dataset_infos.json"), "no file with rows in the folder"),
    ],
)
def test_which_files_of_a_folder(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = touched(tmp_path, *names)
    if message:
        with pytest.raises(DataError, match=message):
            files_of([str(folder)])
    else:
        assert files_of([str(folder)]) == [folder / name for name in names if not name.endswith(".png")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://datasets/a/b", "the source is on a server"),
        ("none.json", "no such file or folder"),
        ("rows.txt", "a file of unknown kind"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, source: str, message: str) -> None:
    touched(tmp_path, "rows.txt")
    with pytest.raises(DataError, match=message):
        files_of([source if "://" in source else str(tmp_path / source)])


@pytest.mark.parametrize("name", ["rows.arrow", "rows.parquet"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 no such thing")
    with pytest.raises(DataError, match="cannot read the rows"):
        contents(tmp_path / name)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_base64_alone(image_format: str) -> None:
    """A long text that begins as an image file does is no path."""
    text = base64.b64encode(png("red", (400, 300), image_format)).decode()
    assert to_picture(text).value == {"bytes": text}
    assert to_picture("/9j/a.jpg").value == "/9j/a.jpg"
