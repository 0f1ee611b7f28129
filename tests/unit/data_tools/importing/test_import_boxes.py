"""Boxes become parts of the image: which pixels, in which block, in which unit. Against numpy's slices of the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported import Imported, import_made
from PIL import ExifTags, Image

WIDTH, HEIGHT = 100, 60
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images" / "in.png")
    return tmp_path


def parts(imported: Imported, row: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(imported.folder / path)) for path in imported.rows[row]["image_output"]]


def texts(imported: Imported) -> list[tuple[str, str]]:
    return [(row["text_input"], row["text_output"]) for row in imported.rows]


def lvr_row(answer: str, bboxes: Any, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
    row = {"dataset": "gqa", "split": "train", "question_id": 7, "image": ["images/in.png"]}
    return row | {"conversations": turns, "bboxes": bboxes} | changes


def test_lvr(folder: Path) -> None:
    rows = [
        lvr_row("<lvr>\n<answer> No </answer>", [[0.1, 0.5, 0.3, 1.0]]),
        lvr_row("<lvr> then <lvr> so \u00e9", [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]]),
        lvr_row("<lvr> one", []),
        lvr_row("<lvr> one", [[0, 0, 1, 1], [0, 0, 1, 1]]),
        lvr_row("<lvr> one", [[10, 10, 20, 20]]),
        lvr_row("<lvr> one", [[0.5, 0.5, 0.5, 1]]),
        lvr_row("<lvr> one", [[0, 0, 1, 1]], image=["images/in.png", "images/in.png"]),
    ]
    imported = import_made(folder, "lvr", rows, margin=0)
    assert texts(imported) == [
        ("<image>\nWhich?", "<output_image>\nAnswer: No"),
        ("<image>\nWhich?", "<output_image> then <output_image> so \u00e9"),
    ]
    assert imported.rows[0].items() >= {"dataset": "gqa", "split": "train", "question_id": 7}.items()
    (first,) = parts(imported, 0)
    assert np.array_equal(first, PIXELS[30:60, 10:30])
    left, right = parts(imported, 1)
    assert np.array_equal(left, PIXELS[:30, :50])
    assert np.array_equal(right, PIXELS[:, 50:])
    assert imported.report["left_out"] == {
        "no image behind a marker": 1,
        "images without a marker": 1,
        "a box is not within 0 and 1": 1,
        "no box in bboxes": 1,
        "boxes with several images": 1,
    }


def visual_cot_row(**changes: Any) -> dict[str, Any]:
    row = {"question": "What?", "answer": "a flag", "image": "in.png", "width": WIDTH, "height": HEIGHT}
    return row | {"bboxs": [[20, 10, 40, 30]], "dataset": "docvqa", "split": "train"} | changes


def test_visual_cot(folder: Path) -> None:
    question = "<image>\nWhat? Please provide the bounding box coordinate of the region that can help you answer the "
    turns = [question + "question better.", "[0.2, 0.1, 0.4, 0.3]", "<image>", "a flag"]
    chat = {
        "image": ["in.png", "in.png###[20, 10, 40, 30]"],
        "conversations": [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(turns)],
    }
    rows = [
        visual_cot_row(),
        visual_cot_row(bboxs=[[20, 10, 40, 30], [90, 50, 130, 70]]),
        chat,
        visual_cot_row(width="100", height=60.0, bboxs=[[-10, 10, 10, 30]]),
        visual_cot_row(width=200),
        visual_cot_row(width=200.0),
        visual_cot_row(width="200"),
        visual_cot_row(width="wide"),
        visual_cot_row(bboxs=[[100, 10, 140, 30]]),
        visual_cot_row(bboxs=[[20, 10, 40]]),
        visual_cot_row(bboxs=[]),
        chat | {"image": ["in.png", "in.png"]},
    ]
    imported = import_made(folder, "visual-cot", rows, images=folder / "images")
    assert texts(imported) == [
        ("<image>What?", "<output_image>a flag"),
        ("<image>What?", "<output_image><output_image>a flag"),
        ("<image>What?", "<output_image>a flag"),
        ("<image>What?", "<output_image>a flag"),
    ]
    assert imported.rows[0]["answer"] == "a flag"
    assert imported.report["tiny_parts"] == 5, "all of them have a side of less than 28 pixels"
    default = PIXELS[8:32, 18:42]  # a tenth of 20 pixels around
    assert np.array_equal(parts(imported, 0)[0], default)
    assert np.array_equal(parts(imported, 1)[1], PIXELS[48:60, 86:100]), "cut off at the edge"
    assert np.array_equal(parts(imported, 2)[0], default)
    assert np.array_equal(parts(imported, 3)[0], PIXELS[8:32, :12]), "cut off at the left edge, of which it is outside"
    assert imported.report["left_out"] == {
        "the image has another size than the row says": 3,
        "no width and height": 1,
        "a box is outside of its image": 1,
        "no box in bboxs": 1,
        "no box": 1,
        "not a question, its box and its answer": 1,
    }
    (wide,) = import_made(folder, "visual-cot", rows[:1], images=folder / "images", margin=0.5).rows
    with Image.open(folder / "imported-1" / wide["image_output"][0]) as part:
        assert np.array_equal(np.asarray(part), PIXELS[0:40, 10:50])


def test_boxes_are_of_the_image_as_it_is_shown(folder: Path) -> None:
    """Turned as EXIF says: orientation 6 is stored with its top on the left."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(PIXELS)).save(folder / "images" / "in.png", exif=exif)
    imported = import_made(folder, "visual-cot", [visual_cot_row()], images=folder / "images", margin=0)
    assert np.array_equal(parts(imported, 0)[0], PIXELS[10:30, 20:40])


def test_lantern(folder: Path) -> None:
    def row(traces: Any, bboxs: Any) -> dict[str, Any]:
        return {"question": "How?", "img_path": "images/in.png", "bboxs": bboxs, "reasoning_traces": traces}

    boxes = [[0, 0, 10, 10], [10, 0, 30, 30]]
    after = {"post_visual_latent_reasoning": ["I see.", "I see more."], "answer": "two"}
    rows = [
        row({"pre_visual_text_think": "First.", "text_think": None, **after}, boxes),
        row({"text_think": "No need to look.", "answer": "two"}, boxes),
        row({"text_think": " \n", "pre_visual_text_think": " ", **after, "answer": 2}, boxes),
        row(after, boxes[:1]),
        row({"answer": "two"}, boxes),
        row("two", boxes),
    ]
    imported = import_made(folder, "lantern", rows, margin=0)
    assert texts(imported) == [
        ("<image>How?", "First.\n<output_image>I see.\n<output_image>I see more.\nAnswer: two"),
        ("<image>How?", "No need to look.\nAnswer: two"),
        ("<image>How?", "<output_image>I see.\n<output_image>I see more.\nAnswer: 2"),
    ]
    first, second = parts(imported, 0)
    assert np.array_equal(first, PIXELS[:10, :10])
    assert np.array_equal(second, PIXELS[:30, 10:30])
    assert "image_output" not in imported.rows[1]
    assert imported.report["left_out"] == {"not one text for each box": 2, "no reasoning_traces": 1}
