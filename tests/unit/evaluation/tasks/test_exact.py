"""`exact`: the right answer of a row, and the status of an answer."""

from typing import Any

import pytest

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.exact import score


@pytest.mark.parametrize(
    ("row", "answer", "status"),
    [
        ({"answer": "Red cube"}, "The answer is red cube.", "Right"),
        ({"answer": 1000}, "\\boxed{1,000}", "Right"),
        ({"answer": 0.5}, ".50", "Right"),
        ({"answer": 0}, "0", "Right"),
        ({"answer": "12"}, "12 cm", "Wrong"),
        ({"answer": "12 cm"}, "12", "Wrong"),
        ({"answer": "red", "text_output": "\\boxed{blue}"}, "blue", "Wrong"),
        ({"text_output": "<think> x </think> \\boxed{blue}"}, "blue", "Right"),
        ({"text_output": "Answer: 7"}, "\\boxed{7.0}", "Right"),
        ({"text_output": "yes"}, "Yes.", "Right"),
        ({"text_output": "yes"}, "yes, it does", "Wrong"),
        ({"answer": "red"}, "\\boxed{red", "Invalid"),
        ({"answer": "red"}, "", "Invalid"),
    ],
)
def test_scores(row: dict[str, Any], answer: str, status: str) -> None:
    outcome = score(row, answer)
    assert (outcome.status, outcome.success) == (status, status == "Right")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no field text_output or answer"),
        ({"answer": "  "}, "the row has no right answer"),
        ({"text_output": "\\boxed{}"}, "the row has no right answer"),
        ({"answer": ["red"]}, r"answer is \['red'\] .* expected a text or a number"),
        ({"answer": True}, "answer is True"),
    ],
)
def test_rows_without_a_right_answer(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(row, "red")
