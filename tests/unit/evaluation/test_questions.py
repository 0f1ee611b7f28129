"""The rows that are asked: helper images are read where an arm needs them, and then checked."""

from pathlib import Path

import pytest
from generated_rows import image_bytes, write_jsonl

from mirage_ds.errors import DataError
from mirage_ds.evaluation.latents.arms import parse_arms
from mirage_ds.evaluation.questions import read_questions_of

ORACLE = parse_arms("own,oracle")


def write(folder: Path, *rows: dict) -> Path:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(image_bytes(seed=ord(name[0])))
    (folder / "bad.png").write_bytes(b"no image")
    return write_jsonl(folder / "rows.jsonl", [{"text_input": "?"} | row for row in rows])


def test_helper_images_are_read_for_the_oracle_alone(tmp_path: Path) -> None:
    slots = "<output_image> and <output_image>"
    rows = write(
        tmp_path,
        {"image_output": "a.png"},
        {},
        {"image_output": ["a.png", "b.png"], "text_output": slots, "latent_size": [2, 3]},
        {"image_output": "b.png", "text_output": "yes", "latent_size": 5},
        {"text_output": "no", "latent_size": 5},
    )
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    samples = [row.sample for row in read_questions_of(rows, ORACLE)]
    assert [sample.helper_images for sample in samples] == [(a,), (), (a, b), (b,), ()]
    assert [sample.latent_sizes for sample in samples] == [(), (), (2, 3), (5,), ()]
    assert all(row.sample.helper_images == () for row in read_questions_of(rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_output": "none.png"}, r"image_output cannot be read: 'none.png'"),
        ({"image_output": "bad.png"}, r"cannot be decoded.*rows.jsonl:1, helper image 0"),
        (
            {"image_output": ["a.png", "b.png"], "text_output": "<output_image>"},
            "slots in text_output: 1, helper images: 2",
        ),
        ({"image_output": "a.png", "latent_size": 0}, "latent_size is 0"),
        ({"text_output": "<output_image>"}, r"rows with helper images \(image_output\): 0 .*--latents oracle"),
    ],
)
def test_helper_images_that_cannot_be_used(row: dict, message: str, tmp_path: Path) -> None:
    """They are no fault where no arm needs them."""
    rows = write(tmp_path, row)
    with pytest.raises(DataError, match=message):
        read_questions_of(rows, ORACLE)
    assert len(read_questions_of(rows)) == 1
