"""What TensorBoard shows of an answer: its text with marks, and its picture, against pixels and colours."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from generated_rows import write_rows
from PIL import Image
from written_answers import ANSWER

from mirage_ds.data.rows import read_questions
from mirage_ds.evaluation.training.looks import GAP_PX, LATENT_MARK, LINE_PX, TILE_PX, marked, not_shown, picture


def test_latents_are_marked_in_an_answer() -> None:
    assert marked(ANSWER) == f"go {LATENT_MARK}{LATENT_MARK}right"
    assert marked(replace(ANSWER, latents_at=[])) == "go right"


def test_a_picture_has_a_tile_for_each_image_and_latent(tmp_path: Path) -> None:
    """The colours reach from the smallest cosine of all latents to the largest, which is the lightest."""
    (sample,) = [sample for _, sample in read_questions(write_rows(tmp_path / "rows", 1), helpers=True)]
    maps = np.array([[[0.9, 0.7]], [[0.8, 0.8]]], np.float32)
    drawn = picture(sample, [maps], [("question", "Where?"), ("answer", "right " * 100)], turned=True)
    assert drawn.height > 2 * (LINE_PX + TILE_PX) + 8 * LINE_PX  # two rows of tiles, and many lines of text

    def pixel(tile: int, x: float, y: float) -> tuple[int, ...]:
        """At a place of a tile, from 0 to 1."""
        left, above = GAP_PX + tile % 3 * (TILE_PX + GAP_PX), tile // 3 * (LINE_PX + TILE_PX + GAP_PX) + LINE_PX
        found = drawn.getpixel((left + int(x * TILE_PX), above + int(y * TILE_PX)))
        assert isinstance(found, tuple)
        return found

    for tile, name in enumerate(("0_0.png", "0_1.png")):
        with Image.open(tmp_path / "rows" / "images" / name) as image:
            assert pixel(tile, 1 / 6, 1 / 6) == image.convert("RGB").getpixel((14, 14))
    left, right, neutral = pixel(2, 0.25, 0.5), pixel(2, 0.75, 0.5), pixel(3, 0.25, 0.5)
    assert sum(left) > sum(neutral) > sum(right)


def test_a_picture_of_several_images_and_many_latents(tmp_path: Path) -> None:
    """Each latent has a tile for each input image, latent by latent; what has no room is said."""
    (sample,) = [sample for _, sample in read_questions(write_rows(tmp_path / "rows", 1), helpers=True)]
    sample = replace(sample, input_images=sample.input_images * 2)
    maps = [np.array([[[0.9, 0.7]]] * 3, np.float32), np.array([[[0.7, 0.9]]] * 3, np.float32)]
    drawn = picture(sample, maps, [], turned=True)
    assert drawn.height == 3 * (LINE_PX + TILE_PX + GAP_PX) + 2 * GAP_PX  # 3 images and 3 x 2 heat maps
    above = LINE_PX + TILE_PX // 2
    left_to_right = []
    for tile in range(3, 9):
        row, column = divmod(tile, 3)
        x, y = GAP_PX + column * (TILE_PX + GAP_PX), row * (LINE_PX + TILE_PX + GAP_PX) + above
        left, right = (drawn.getpixel((x + TILE_PX * part // 4, y)) for part in (1, 3))
        assert isinstance(left, tuple)
        assert isinstance(right, tuple)
        left_to_right.append(sum(left) > sum(right))
    assert left_to_right == [True, False] * 3
    assert not_shown(sample, 32) == ""
    assert not_shown(sample, 33) == "1 more latent"
    many = replace(sample, input_images=sample.input_images * 5, helper_images=sample.helper_images * 9)
    assert not_shown(many, 10) == "2 more input images, 1 more helper image, 2 more latents"
