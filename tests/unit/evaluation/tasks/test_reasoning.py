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
        ("\\boxed{BC}", False),
        ("\\boxed{}", False),
        ("B", False),
    ],
)
def test_exact_match(answer: str, right: bool) -> None:
    outcome = score("so \\boxed{B}.", answer)
    assert outcome.success is right


def test_any_number_of_options() -> None:
    for letter, other in ("DE", "EZ", "ZA"):
        found = [score(f"\\boxed{{{letter}}}", f"\\boxed{{{given}}}") for given in (letter, other, letter.lower())]
        assert [outcome.status for outcome in found] == ["Right", "Wrong", "Invalid"]
        assert [outcome.expected for outcome in found] == [letter] * 3


@pytest.mark.parametrize("text", ["\\boxed{RIGHT}", "\\boxed{AB}", "\\boxed{a}", "\\boxed{}", "A"])
def test_a_row_without_a_choice_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"gives no letter .* with one letter from A to Z"):
        score(text, "\\boxed{A}")
