"""Spatial reasoning: the letter in the last box, exactly."""

import pytest

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.reasoning import score


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<think> x </think>The answer is \\boxed{B}.", True),
        ("\\boxed{A} no, \\boxed{ B }", True),
        ("\\boxed{B} no, \\boxed{A}", False),
        ("\\boxed{b}", False),
        ("\\boxed{B.}", False),
        ("B", False),
    ],
)
def test_exact_match(answer: str, right: bool) -> None:
    outcome = score("so \\boxed{B}.", answer)
    assert outcome.success is right


def test_a_row_without_a_choice_is_refused() -> None:
    with pytest.raises(DataError, match="gives no letter"):
        score("\\boxed{RIGHT}", "\\boxed{A}")
