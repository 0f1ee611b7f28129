"""The command `mirage-data import`: which format a file is taken for, what is reported, what is refused, and that
memory does not depend on the number of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generated_rows import make_row, write_jsonl, write_rows
from imported import put
from typer.testing import CliRunner

from data_tools import cli
from data_tools.importing.formats import FORMATS, recognise
from data_tools.importing.report import reason_in
from mirage_ds.data.rows import read_questions
from mirage_ds.errors import ConfigError, DataError

TURNS = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
# A row of each format with the fields of its publication; the values do not matter here.
LOOKS: dict[str, dict[str, Any]] = {
    "mirage": {"text_input": "?", "text_output": "!", "image_input": "a", "image_output": "b", "map_id": 1},
    "monet": {"metadata": {}, "data": []},
    "zebra-cot": {"Question": "?", "Text Reasoning Trace": "x", "Final Answer": "!", "problem_image_1": {}},
    "thinkmorph": {"pid": 1, "question": "?", "answer": "!", "resoning_thought_0": "x", "reasoning_image_0": {}},
    "v-interaction": {"id": 1, "question": "?", "image": "a", "edited_image": "b", "CoT_with_code": "x", "answer": "!"},
    "lvr": {"dataset": "a", "question_id": 1, "image": ["a"], "conversations": TURNS, "bboxes": [[0, 0, 1, 1]]},
    "visual-cot": {"question": "?", "answer": "!", "image": "a", "width": 1, "height": 1, "bboxs": [[0, 0, 1, 1]]},
    "lantern": {"question": "?", "img_path": "a", "bboxs": [], "reasoning_traces": {}},
    "comt": {"id": 1, "question": "?", "option": [], "image": [], "rationale": "x", "answer": "A", "type": "a"},
    "covt": {"id": 1, "image": "a", "conversations": TURNS},
    "sat": {"image_bytes": [], "question": "?", "answers": [], "question_type": "a", "correct_answer": "!"},
    "sharegpt": {"conversations": TURNS, "images": []},
    "openai": {"messages": []},
    "blink": {"idx": "a", "question": "?", "prompt": "?", "choices": [], "answer": "(A)", "image_1": {}},
    "vstar": {"image": "a", "text": "?", "label": "A", "category": "a", "question_id": 1},
    "mmvp": {"Index": 1, "Question": "?", "Options": "(a) x (b) y", "Correct Answer": "(a)"},
    "hrbench": {"index": 1, "question": "?", "A": 1, "B": 2, "C": 3, "D": 4, "answer": "A", "image": "a"},
}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["import", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_each_format_is_recognised() -> None:
    assert LOOKS.keys() == FORMATS.keys()
    found = {name: recognise(row) for name, row in LOOKS.items()}
    assert {name: format and format.name for name, format in found.items()} == {name: name for name in LOOKS}
    assert recognise({"question": "?", "answer": "!"}) is None
    llava = {"id": 1, "image": ["a", "a###[0, 0, 1, 1]"], "conversations": TURNS}
    assert recognise(llava) == FORMATS["visual-cot"]
    assert recognise({"conversations": TURNS, "image_input": "a"}) == FORMATS["mirage"]


def test_report(tmp_path: Path) -> None:
    """On the terminal and in the folder, with `auto`."""
    put(tmp_path, "red.png")
    rows = [
        {"conversations": TURNS, "images": ["red.png"], "source": "x"},
        {"conversations": TURNS, "source": "x", "score": 1},
        {"conversations": TURNS, "images": ["none.png"], "source": "x", "id": "bad"},
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with source.open("a") as file:
        file.write("{\n")
    printed = run("auto", source, "--output", tmp_path / "out")
    assert printed.splitlines() == [
        "the rows look like sharegpt",
        f"wrote to {tmp_path / 'out'}: rows: 2, images: 1; sharegpt rows that were taken: 2 of 4",
        "left out: 2: image_input cannot be read: 1, malformed JSON: 1; see " + str(tmp_path / "out/left_out.jsonl"),
        "fields that were ignored, with their rows: source: 2, score: 1",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {
        "format": "sharegpt",
        "sources": [str(source)],
        "rows_read": 4,
        "rows_taken": 2,
        "rows_written": 2,
        "images_written": 1,
        "tiny_parts": 0,
        "left_out": {"image_input cannot be read": 1, "malformed JSON": 1},
        "fields_ignored": {"source": 2, "score": 1},
        "files_not_taken": [],
    }
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [(each["where"], each["id"]) for each in left_out] == [(f"{source}:3", "bad"), (f"{source}:4", None)]
    assert "'none.png': No such file" in left_out[0]["reason"]


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    put(tmp_path, "set/in.png")
    write_jsonl(tmp_path / "set" / "a.jsonl", [{"conversations": TURNS, "images": ["in.png"]}])
    other = write_jsonl(tmp_path / "set" / "b.jsonl", [{"messages": []}, {"messages": []}])
    printed = run("auto", tmp_path / "set", "--output", tmp_path / "out")
    assert f"files of which no row was taken, perhaps of another format: {other}" in printed
    assert json.loads((tmp_path / "out" / "report.json").read_text())["files_not_taken"] == [str(other)]


def test_rows_of_ours_stay_as_they_are(tmp_path: Path) -> None:
    """Each field of them, with the images in their order, from several files; nothing is left out or ignored."""
    rows = write_rows(tmp_path / "rows", 3)
    turns = {"conversations": TURNS, "train_answers": "all", "latent_size": 3, "level": {"a": [1]}}
    more = write_jsonl(tmp_path / "rows" / "more.jsonl", [turns])
    run("mirage", rows, more, "--output", tmp_path / "out")
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["images", "report.json", "rows.jsonl"]
    *written, last = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert last == turns
    for number, row in enumerate(written):
        expected = make_row(number)
        for name in ("image_input", "image_output"):
            (path,) = row[name]
            assert (folder / path).read_bytes() == (tmp_path / "rows" / expected[name]).read_bytes()
        images = {name: row[name] for name in ("image_input", "image_output")}
        assert row == expected | images


def test_rows_of_ours_for_evaluation(tmp_path: Path) -> None:
    """As in the reference's test files, which have no answers; a row with a helper image needs one."""
    put(tmp_path, "red.png")
    question = {"text_input": "Which way?", "image_input": "red.png", "map_desc": [[1, 2], [0, 0]]}
    rows = [question, question | {"image_output": "red.png"}, question | {"text_output": ""}]
    rows.append(question | {"text_output": None})
    asked = [*TURNS, {"from": "human", "value": "Which way?"}]
    rows.append({"conversations": asked, "image_input": "red.png"})
    run("auto", write_jsonl(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out")
    (_, sample), (_, with_null), (_, with_turns) = read_questions(tmp_path / "out" / "rows.jsonl")
    assert with_null.text_input == with_turns.text_input == "Which way?"
    assert [turn.text for turn in with_turns.context] == ["?", "!"]
    assert (sample.text_input, sample.extra) == ("Which way?", {"map_desc": [[1, 2], [0, 0]]})
    assert sample.input_images == ((tmp_path / "red.png").read_bytes(),)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"] == {"no text in text_output": 2}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("zebra-cot", "chat.jsonl"), DataError, "the rows look like sharegpt, not zebra-cot (PATH), fields: 'conv"),
        (
            ("auto", "other.jsonl"),
            DataError,
            "the rows are of no format that is known (PATH), fields: 'question', 'answer'; expected one of",
        ),
        (("monet", "other.jsonl"), DataError, "the rows are of no format that is known (PATH)"),
        (("zebracot", "chat.jsonl"), ConfigError, "unknown format 'zebracot'; expected one of mirage, monet"),
        (("sharegpt", "chat.jsonl", "--margin", "0.2"), ConfigError, "--margin with the format sharegpt, which has no"),
        (("mirage", "own.jsonl", "--all-turns"), ConfigError, "--all-turns with the format mirage, which has no turns"),
        (("sharegpt", "none.jsonl"), DataError, "no such file or folder (PATH)"),
        (
            ("sharegpt", "bad.jsonl"),
            DataError,
            "rows: 2, a turn is empty: 2; one of each:\n  - PATH:1: a turn is empty",
        ),
        (("sharegpt", "root.jsonl"), DataError, "begin at another folder than their file of rows, give it as --images"),
        (("auto", "data.json"), DataError, "write the list in 'data' as the file, without the object around it"),
        (("visual-cot", "chat.jsonl", "--margin", "inf"), ConfigError, "--margin inf; allowed: a finite number"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], error: type[Exception], message: str) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"conversations": TURNS}])
    write_jsonl(tmp_path / "other.jsonl", [{"question": "?", "answer": "!"}])
    write_jsonl(tmp_path / "own.jsonl", [{"text_input": "?", "text_output": "!"}])
    write_jsonl(tmp_path / "bad.jsonl", [{"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}] * 2)
    write_jsonl(tmp_path / "root.jsonl", [{"conversations": TURNS, "images": ["none.png"]}] * 2)
    write_jsonl(tmp_path / "data.json", [{"data": [{"conversations": TURNS}]}])
    name, file, *options = arguments
    before = set(tmp_path.iterdir())
    result = CliRunner().invoke(
        cli.app, ["import", name, str(tmp_path / file), "--output", str(tmp_path / "out"), *options]
    )
    assert isinstance(result.exception, error)
    assert message.replace("PATH", str(tmp_path / file)) in str(result.exception)
    assert set(tmp_path.iterdir()) == before


def test_only_files_of_the_data_set_are_copied(tmp_path: Path) -> None:
    """Of a data set of others: not what lies elsewhere on the disk, no device, and nothing that could block."""
    put(tmp_path, "secret.png", "set/images/in.png")
    (tmp_path / "set" / "rows").mkdir()
    os.mkfifo(tmp_path / "set" / "pipe.png")
    (tmp_path / "set" / "link.png").symlink_to("images/in.png")
    inside = ["images/in.png", "rows/../link.png", str(tmp_path / "set/images/in.png")]
    outside = ["../secret.png", str(tmp_path / "secret.png"), (tmp_path / "secret.png").as_uri(), "/dev/zero"]
    rows = [{"conversations": TURNS, "images": [path]} for path in [*inside, *outside, "pipe.png", "images"]]
    rows.append({"conversations": TURNS, "images": [{"path": "../secret.png"}]})
    source = write_jsonl(tmp_path / "set" / "rows.jsonl", rows)
    run("sharegpt", source, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows_taken"] == 3
    assert report["left_out"] == {
        "image_input is outside of the source": 5,
        "image_input is no file of an image": 2,
    }
    # A folder of rows beside that of the images is fine if the folder around both is the source.
    source.rename(tmp_path / "set" / "rows" / "rows.jsonl")
    write_jsonl(tmp_path / "set" / "rows" / "rows.jsonl", [{"conversations": TURNS, "images": ["../images/in.png"]}])
    run("sharegpt", tmp_path / "set", "--output", tmp_path / "again")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "chat.jsonl", [{"conversations": TURNS}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    result = CliRunner().invoke(cli.app, ["import", "auto", str(source), "--output", str(tmp_path / "out")])
    assert "the output already exists" in str(result.exception)


def test_reasons_have_no_values_of_single_rows() -> None:
    assert reason_in(DataError("image_input cannot be read: 'a (1).png': No such file (x:1)")) == (
        "image_input cannot be read"
    )
    assert reason_in(DataError("the image has 5 x 2001 pixels (x:1); allowed")) == "the image has N x N pixels"
    assert reason_in(DataError("image_input: 'http://a' is on a server (x:1)")) == "image_input is on a server"


PEAK = (
    "import resource, sys\nfrom data_tools import cli\ntry:\n    cli.app()\n"
    "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
)


@pytest.mark.parametrize("container", ["list", "lines"])
def test_memory_does_not_depend_on_the_rows(tmp_path: Path, container: str) -> None:
    put(tmp_path, "red.png")
    row = json.dumps({"conversations": TURNS, "images": ["red.png"], "padding": "x" * 8000})
    peaks = []
    for count in (500, 5000):  # the second one 40 MB of JSON
        path = tmp_path / f"{count}.json"
        path.write_text("[" + ",".join([row] * count) + "]" if container == "list" else f"{row}\n" * count)
        command = [sys.executable, "-c", PEAK, "import", "auto", str(path), "--output", str(tmp_path / f"out-{count}")]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(finished.stderr.split()[-1]))
        assert f"rows: {count}, images: 1;" in finished.stdout
    assert peaks[1] < 1.2 * peaks[0]
