"""The sentences at the demo's end say what the numbers say, whichever way those fall; the picture can be read."""

from dataclasses import replace
from pathlib import Path

import pytest
from generated_rows import image_bytes
from PIL import Image
from rich.console import Console

from launch.demo_report import LABELS, conclusions, count_malformed, draw_picture, results_table
from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.tasks.outcome import Outcome


def answers(num_solved: int, *, malformed: int = 0, num_latents: int = 4, num_replaced: int = 0) -> list[Answer]:
    """400 answers; the malformed ones come last."""
    statuses = (
        ["Reached goal"] * num_solved + ["Fell in hole"] * (400 - num_solved - malformed) + ["Invalid"] * malformed
    )
    return [replace(answer(status, num_latents, num_replaced), number=number) for number, status in enumerate(statuses)]


def answer(status: str, num_latents: int = 4, num_replaced: int = 0, *, complete: bool = True) -> Answer:
    scores = {"strict": Outcome(status == "Reached goal", status)}
    latents = {"num_latents": num_latents, "num_replaced": num_replaced, "latents_at": [0] * num_latents}
    what = {"number": 0, "where": "", "arm": "own", "sample": 0, "text": "LEFT", "num_tokens": 9, "num_blocks": 1}
    return Answer(**what, **latents, complete=complete, scores=scores)


def demo(
    text: int, own: int, shuffled: int, mean: int, zero: int, *, malformed: int = 0, num_replaced: int = 4
) -> dict[str, list[Answer]]:
    replaced = {"stage2_shuffled": shuffled, "stage2_mean": mean}
    replaced |= {"stage2_noise": max(0, own - 4), "stage2_oracle": max(0, own - 8)}
    found = {
        "untrained": answers(0),
        "text": answers(text, num_latents=0),
        "stage1": answers(50),
        "stage1_oracle": answers(170),
        "stage2": answers(own),
    }
    found |= {name: answers(count, num_replaced=num_replaced) for name, count in replaced.items()}
    return found | {"stage2_zeroed": answers(zero, malformed=malformed, num_replaced=4)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            demo(292, 308, 190, 194, 49, malformed=120),
            [
                "own latents minus text only: +4.0 points",
                "better than text only",
                "own minus shuffled latents: +29.5 points",
                "own minus mean latents: +28.5 points",
                "the content helps",
                "0 answers are malformed with own latents, 0 with shuffled, 0 with mean",
                "own minus zeroed latents: +64.8 points",
                "120 answers are malformed with zeros",
                "shuffled minus zeroed latents: +35.2 points",
                "zeroing overstates what the content is worth",
                "own minus own with noise: +1.0 points",
                "oracle minus own: +30.0 points",
                "own minus oracle: +2.0 points",
            ],
        ),
        (
            demo(300, 300, 300, 300, 120),
            [
                "own latents minus text only: +0.0 points",
                "no difference is shown",
                "no effect of the content is shown",
                "0 answers are malformed with zeros",
                "zeroing overstates what the content is worth",
            ],
        ),
        (
            demo(340, 300, 340, 340, 350),
            ["worse than text only", "the content harms", "zeroing understates what the content is worth"],
        ),
        (demo(0, 0, 0, 0, 0), ["no difference is shown", "no effect", "no difference between the two is shown"]),
    ],
)
def test_sentences_follow_the_numbers(found: dict[str, list[Answer]], expected: list[str]) -> None:
    said = " ".join(conclusions(found))
    for words in expected:
        assert words in said
    unsaid = {"the content helps", "the content harms", "overstates", "understates", "better than", "worse than"}
    assert not [words for words in unsaid if words in said and not any(words in part for part in expected)]


def test_latents_that_kept_their_states_are_counted() -> None:
    assert "3200 latents could not be replaced" in " ".join(conclusions(demo(9, 9, 9, 9, 9, num_replaced=2)))
    assert "could not be replaced" not in " ".join(conclusions(demo(9, 9, 9, 9, 9)))


def test_an_answer_without_moves_or_end_is_malformed() -> None:
    cut_off = answer("Fell in hole", complete=False)
    assert count_malformed([cut_off, *answers(390, malformed=3)]) == 4


def test_the_table_has_a_line_for_each() -> None:
    console = Console(width=80, record=True)  # a log's width, where rich would fold longer lines
    console.print(results_table(demo(292, 308, 190, 194, 49, malformed=7), dict.fromkeys(LABELS, 640)))
    printed = console.export_text()
    for label in LABELS.values():
        assert label in printed
    for figures in ("47.5%", "42.7% - 52.4%", "77.0%", "│         7 │"):
        assert figures in printed


def test_the_picture_has_a_column_for_each_trained_model(tmp_path: Path) -> None:
    """No column's longest line runs into the next one."""
    image = image_bytes((84, 84), seed=0)
    samples = [Sample(f"{row}", "?", "", (image,), (image,)) for row in range(8)]
    found = {name: answers(4) for name in LABELS}
    for one in found["text"]:
        one.text = "\\boxed{" + "DOWN," * 20
    draw_picture(samples, found, tmp_path / "answers.png")
    with Image.open(tmp_path / "answers.png") as picture:
        num_columns = len(LABELS) - 1
        edges = [200 + (picture.width - 200) * column // num_columns for column in range(1, num_columns)]
        gaps = [picture.crop((edge - 6, 0, edge - 2, picture.height)).convert("L").getextrema()[0] for edge in edges]
    assert all(darkest == 255 for darkest in gaps)
