"""Evaluation sets become rows that the task choice scores as they are: written answers get the right scores."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from imported import Imported, import_file, import_made, png, put

from mirage_ds.data.rows import read_questions
from mirage_ds.evaluation.scoring import load_task


def statuses(imported: Imported, number: int, *answers: str) -> str:
    """The status of each answer to a row, by its first letter, as `mirage evaluate --task choice` scores it."""
    samples = [sample for _, sample in read_questions(imported.folder / "rows.jsonl")]
    task = load_task("choice")
    return "".join(task.score(samples[number], answer)["choice"].status[0] for answer in answers)


def test_blink(tmp_path: Path) -> None:
    row = {
        "idx": "val_Jigsaw_1",
        "sub_task": "Jigsaw",
        "question": "Which fits?",
        "prompt": "Which fits?\nSelect from the following choices.\n(A) the second image\n(B) the third image",
        "choices": ["the second image", "the third image"],
        "answer": "(B)",
        "image_1": {"bytes": base64.b64encode(png("red")).decode(), "path": None},
        "image_2": {"bytes": base64.b64encode(png("lime")).decode(), "path": None},
        "image_4": None,
        "explanation": "",
    }
    rows = [row, row | {"answer": "hidden"}, row | {"choices": ["one"]}, row | {"image_1": None, "image_2": None}]
    imported = import_made(tmp_path, "blink", rows)
    assert imported.shown() == [
        {
            "text_input": f"<image><image>{row['prompt']}",
            "image_input": ["red", "lime"],
            "idx": "val_Jigsaw_1",
            "sub_task": "Jigsaw",
            "question": "Which fits?",
            "options": ["the second image", "the third image"],
            "answer": "(B)",
        }
    ]
    assert statuses(imported, 0, "B", "(B)", "<think>x</think>the third image", "A", "Answer: C", "") == "RRRWII"
    assert imported.report["left_out"] == {
        "the task choice cannot score it": 1,
        "no list of texts in choices": 1,
        "no image": 1,
    }


def test_vstar(tmp_path: Path) -> None:
    put(tmp_path, "direct_attributes/red.jpg")
    text = "What is the colour?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."
    row = {"image": "direct_attributes/red.jpg", "text": text, "label": "A", "category": "direct", "question_id": 4}
    imported = import_made(tmp_path, "vstar", [row, row | {"text": "What is the colour?"}, row | {"label": "D"}])
    assert imported.shown() == [
        {
            "text_input": f"<image>{text}",
            "image_input": ["red"],
            "question_id": 4,
            "category": "direct",
            "answer": "A",
        }
    ]
    assert statuses(imported, 0, "A", "red", "(B) blue", "C") == "RRWI"
    assert imported.report["left_out"] == {"the task choice cannot score it": 2}


def test_mmvp_from_its_csv(tmp_path: Path) -> None:
    put(tmp_path, "MMVP Images/1.jpg", "MMVP Images/2.jpg")
    (tmp_path / "Questions.csv").write_text(
        "Index,Question,Options,Correct Answer\n"
        '1,"Are the wings open, or closed?",(a) Open (b) Closed,(a)\n'
        "2,Which way?,(a) Left (b) Right (c) Up,(c)\n"
        "3,No such image?,(a) Yes (b) No,(b)\n"
        "1,No options?,Yes,(b)\n"
        "1,Another order?,(a) The letter (c) (b) None,(b)\n"
        "1,What is it?,(a) Cat(s) (b) Dog(s),(b)\n",
        encoding="utf-8",
    )
    imported = import_file(tmp_path, "mmvp", tmp_path / "Questions.csv", images=tmp_path / "MMVP Images")
    assert imported.shown() == [
        {
            "text_input": "<image>Are the wings open, or closed?\n(A) Open\n(B) Closed",
            "image_input": ["red"],
            "index": "1",
            "options": ["Open", "Closed"],
            "answer": "(a)",
        },
        {
            "text_input": "<image>Which way?\n(A) Left\n(B) Right\n(C) Up",
            "image_input": ["lime"],
            "index": "2",
            "options": ["Left", "Right", "Up"],
            "answer": "(c)",
        },
        {
            "text_input": "<image>What is it?\n(A) Cat(s)\n(B) Dog(s)",
            "image_input": ["red"],
            "index": "1",
            "options": ["Cat(s)", "Dog(s)"],
            "answer": "(b)",
        },
    ]
    assert statuses(imported, 0, "A", "(a)", "open", "B", "maybe") == "RRRWI"
    assert statuses(imported, 1, "C", "Up", "(b)") == "RRW"
    assert imported.report["left_out"] == {"image_input cannot be read": 1, "no options": 2}


@pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
def test_hrbench(tmp_path: Path, suffix: str) -> None:
    row: dict[str, Any] = {
        "index": 5,
        "question": "What number?",
        "A": 12,
        "B": "13",
        "C": "14",
        "D": "none",
        "answer": "B",
        "image": base64.b64encode(png("blue")).decode(),
        "category": "single",
        "cycle_category": "0",
    }
    rows = [row, row | {"answer": "E"}, row | {"D": None}, row | {"image": "none.jpg"}]
    path = tmp_path / f"hr_bench_4k.{suffix}"
    if suffix == "tsv":
        lines = [["" if each.get(name) is None else str(each[name]) for name in row] for each in rows]
        path.write_text("".join("\t".join(line) + "\n" for line in [list(row), *lines]))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    imported = import_file(tmp_path, "hrbench", path)
    (shown,) = imported.shown()
    assert shown["text_input"] == "<image>What number?\n(A) 12\n(B) 13\n(C) 14\n(D) none"
    assert shown["image_input"] == ["blue"]
    assert (shown["options"], shown["answer"]) == (["12", "13", "14", "none"], "B")
    assert (shown["cycle_category"], shown["category"]) == ("0", "single")
    assert statuses(imported, 0, "B", "13", "The answer is B.", "A", "15") == "RRRWI"
    assert imported.report["left_out"] == {
        "the task choice cannot score it": 1,
        "no text in D": 1,
        "image_input is not base64": 1,
    }


def test_sat(tmp_path: Path) -> None:
    row = {
        "image_bytes": [{"bytes": base64.b64encode(png(colour)).decode()} for colour in ("red", "blue")],
        "question": "Did it move left or right?",
        "answers": ["moved left", "moved right"],
        "question_type": "action",
        "correct_answer": "moved right",
    }
    rows = [row, row | {"correct_answer": "up"}, row | {"answers": None}, row | {"image_bytes": []}]
    imported = import_made(tmp_path, "sat", rows)
    assert imported.shown() == [
        {
            "text_input": "<image><image>Did it move left or right?\n(A) moved left\n(B) moved right",
            "text_output": "moved right",
            "image_input": ["red", "blue"],
            "question_type": "action",
            "options": ["moved left", "moved right"],
            "answer": "moved right",
        }
    ]
    assert statuses(imported, 0, "B", "moved right", "A", "moved") == "RRWI"
    assert imported.report["left_out"] == {
        "the right answer is not among the options": 1,
        "no list of texts in answers": 1,
        "no image": 1,
    }
