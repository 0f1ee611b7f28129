"""Interleaved reasoning becomes answers with latent blocks. Against expectations written by hand."""

from pathlib import Path
from typing import Any

import pyarrow
from imported import import_file, import_made, png, put
from pyarrow import parquet


def test_zebra_cot_from_parquet(tmp_path: Path) -> None:
    """Images as {bytes, path}, columns that are null where a row has fewer images."""

    def image(colour: str | None) -> dict[str, Any] | None:
        return None if colour is None else {"bytes": png(colour), "path": None}

    def row(question: str, trace: str, problem: str | None, *reasoning: str | None) -> dict[str, Any]:
        return {
            "Question": question,
            "Text Reasoning Trace": trace,
            "Final Answer": "\u4e09",
            "problem_image_1": image(problem),
            "reasoning_image_1": image(reasoning[0]),
            "reasoning_image_2": image(reasoning[1]),
        }

    trace = (
        "THOUGHT 0: I look.\n<image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: Again.\n[reasoning_image_2] Done."
    )
    rows = [
        row("Count <image_start>[problem_image_1]<image_end> now", trace, "red", "lime", "blue"),
        row("Count", "THOUGHT 1: Once. <image_start>[reasoning_image_1]<image_end>", "red", "lime", None),
        row("Count", trace, "red", "lime", None),
        row("Count", "THOUGHT 1: No image.", "red", "lime", None),
        row("Count", "", "red", None, None),
        row("Count", "I look. <image_start>[sketch_1]<image_end>", "red", None, None),
        row("Count", "I look. <image_start>[reasoning_image_1]", "red", "lime", None),
        row("Count", "Once. <IMAGE_START>[Reasoning_Image_1]<image_end>", "red", "red", None),
    ]
    path = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    imported = import_file(tmp_path, "zebra-cot", path)
    assert imported.shown() == [
        {
            "text_input": "Count <image> now",
            "text_output": "I look.\n<output_image>\nAgain.\n<output_image> Done.\nAnswer: \u4e09",
            "image_input": ["red"],
            "image_output": ["lime", "blue"],
            "answer": "\u4e09",
        },
        {
            "text_input": "<image>Count",
            "text_output": "Once. <output_image>\nAnswer: \u4e09",
            "image_input": ["red"],
            "image_output": ["lime"],
            "answer": "\u4e09",
        },
        {
            "text_input": "<image>Count",
            "text_output": "Once. <output_image>\nAnswer: \u4e09",
            "image_input": ["red"],
            "image_output": ["red"],
            "answer": "\u4e09",
        },
    ]
    assert imported.report["left_out"] == {
        "no image behind a marker": 3,
        "images without a marker": 1,
        "no text in Text Reasoning Trace": 1,
    }
    assert [each["where"] for each in imported.left_out] == [f"{path}, row {number}" for number in (2, 3, 4, 5, 6)]


def test_thinkmorph(tmp_path: Path) -> None:
    put(tmp_path, "in.png", "a.png", "b.png")
    row = {
        "pid": "vs-1",
        "question": "Where?",
        "answer": "A",
        "problem_image_0": "in.png",
        "resoning_thought_0": "I circle it.",
        "reasoning_image_0": "a.png",
        "resoning_thought_1": "It is on the left.",
        "task": "Visual_Search",
        "full_text_only_thought": "Long.",
    }
    rows = [
        row,
        row | {"question": "In <image> where?", "reasoning_image_1": "b.png", "resoning_thought_2": "Sure."},
        {name: value for name, value in row.items() if name != "reasoning_image_0"},
        row | {"answer": None},
        row | {"problem_image_0": ["in.png", "a.png"]},
    ]
    imported = import_made(tmp_path, "thinkmorph", rows)
    fields = {"pid": "vs-1", "task": "Visual_Search", "answer": "A", "image_input": ["red"]}
    assert imported.shown() == [
        {
            "text_input": "<image>Where?",
            "text_output": "I circle it.\n<output_image>\nIt is on the left.\nAnswer: A",
            "image_output": ["lime"],
            **fields,
        },
        {
            "text_input": "In <image> where?",
            "text_output": "I circle it.\n<output_image>\nIt is on the left.\n<output_image>\nSure.\nAnswer: A",
            "image_output": ["lime", "blue"],
            **fields,
        },
    ]
    assert imported.report["left_out"] == {
        "not one image between each two thoughts": 1,
        "no text in answer": 1,
        "not one image in problem_image_0": 1,
    }
    assert imported.report["fields_ignored"] == {"full_text_only_thought": 2}


def test_v_interaction(tmp_path: Path) -> None:
    put(tmp_path, "in.png", "edited.png")
    row = {
        "id": 3,
        "question": "How long?",
        "image": "in.png",
        "original_img_code": "x",
        "edited_image": "edited.png",
        "tool_code": "draw()",
        "CoT_with_code": "I draw a line.\n```python\ndraw()\n```\nIt has 3 cm.",
        "answer": 3,
    }
    rows = [
        row,
        row | {"CoT_with_code": "No code."},
        row | {"CoT_with_code": "```a```<code>b</code>"},
        row | {"edited_image": None},
        row | {"edited_image": "none.png"},
    ]
    imported = import_made(tmp_path, "v-interaction", rows)
    fields = {
        "text_input": "<image>How long?",
        "image_input": ["red"],
        "image_output": ["lime"],
        "id": 3,
        "answer": "3",
    }
    assert imported.shown() == [
        {"text_output": "I draw a line.\n<output_image>\nIt has 3 cm.\nAnswer: 3", **fields},
        {"text_output": "<output_image>No code.\nAnswer: 3", **fields},
    ]
    assert imported.report["left_out"] == {
        "several pieces of code for one edited image": 1,
        "not one image in edited_image": 1,
        "image_output cannot be read": 1,
    }
    assert imported.report["fields_ignored"] == {"original_img_code": 2, "tool_code": 2}


def test_comt(tmp_path: Path) -> None:
    put(tmp_path, "images/creation/7-0.png", "images/creation/7-1.jpg", "images/creation/7-2.png")
    row = {
        "id": "7",
        "question": "Which angle?",
        "option": ["30", "60"],
        "image": ["IMAGE0:7-0", "[IMAGE1:7-1.jpg]", "IMAGE2:7-2"],
        "rationale": "I draw [IMAGE1] and then IMAGE2. So it is 60.",
        "answer": "B",
        "type": "creation",
        "annotations": "",
    }
    rows = [
        row,
        row | {"question": "Which angle in [IMAGE0]?", "option": ["(A) 30", "(B) 60"]},
        row | {"rationale": "I draw [IMAGE3]."},
        row | {"answer": "C"},
        row | {"image": ["IMAGE0:none"], "rationale": "I see it."},
        row | {"option": "30"},
        row | {"image": ["IMAGE0:7-0", "IMAGE1:7-1", "IMAGE2:7-2"], "rationale": "In IMAGE0 I draw IMAGE1, IMAGE2."},
        # The question's image once more, under another name and with the brackets of the text.
        row | {"image": ["IMAGE0:7-0", "IMAGE1:7-0"], "rationale": "I keep it (as in IMAGE1) (IMAGE1)."},
    ]
    imported = import_made(tmp_path, "comt", rows)
    fields = {
        "text_output": "I draw <output_image> and then <output_image>. So it is 60.\nAnswer: B",
        "image_input": ["red"],
        "image_output": ["lime", "blue"],
        "id": "7",
        "type": "creation",
        "options": ["30", "60"],
        "answer": "B",
    }
    assert imported.shown() == [
        {"text_input": "<image>Which angle?\n(A) 30\n(B) 60", **fields},
        {"text_input": "Which angle in <image>?\n(A) 30\n(B) 60", **fields},
        {"text_input": "<image>Which angle?\n(A) 30\n(B) 60"}
        | fields
        | {
            "text_output": "I keep it (as in <output_image>) <output_image>.\nAnswer: B",
            "image_output": ["red", "red"],
        },
    ]
    assert imported.report["left_out"] == {
        "no image behind a marker": 1,
        "the task choice cannot score it": 1,
        "image_input cannot be read": 1,
        "no list of texts in option": 1,
        "the rationale names all images": 1,
    }
