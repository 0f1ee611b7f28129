"""What a text gives as the answer, and which pieces of text are the same answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_ds.evaluation.tasks.given import canonical, extract_given


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{A} no, \\boxed{ B }.", "B"),
        ("Answer: A, so \\boxed{B}", "B"),
        ("\\boxed{B}. The answer is A.", "B"),
        ("Answer: A, so \\boxed{B", ""),  # cut off
        ("\\boxed{}", ""),
        ("The answer is 12 cm.\nDone.", "12 cm."),
        ("Answer: A\nno.\nAnswer: B", "B"),
        ("answer:\n\n  B \nas it is red", "B"),
        ("**Answer:** B", "B"),
        ("**Answer**: B", "B"),
        ("The answer is: B", "B"),
        ("the final ANSWER IS B", "B"),
        ("Answer:", ""),
        ("My answers: B", "My answers: B"),
        ("the answer isn't B", "the answer isn't B"),
        ("<think> A or B? </think>\n B ", "B"),
        (" B ", "B"),
        ("", ""),
    ],
)
def test_what_a_text_gives(text: str, found: str) -> None:
    assert extract_given(text) == found


@pytest.mark.parametrize(
    "same",
    [
        ("1000", "1,000", "1000.0", "+1000", " 1000. ", "$1,000$", "01000", "\\text{1000}"),
        ("0.5", ".5", "0.50", "'.5'"),
        ("0", "-0.0", "0.", "00"),
        ("-3", "-3.0", "`-3`"),
        ("12 cm", "12  CM.", "12 \\text{cm}", '"12 cm"'),
        ("a red cube", "A red\ncube.", "**A red cube**", "\u201cA Red Cube\u201d"),
        ("cafe\u0301", "CAF\u00c9"),
        (".", " . "),
        ("", "  "),
    ],
)
def test_the_same_answer(same: tuple[str, ...]) -> None:
    assert {canonical(text) for text in same} == {canonical(same[0])}


def test_other_answers() -> None:
    """No unit, article or bracket is left out, no two are close enough."""
    texts = [
        "12",
        "12 cm",
        "12%",
        "12/5",
        "-12",
        "1,2",
        "12 5",
        "(12)",
        "12.001",
        "1e3",
        "the 12",
        "red one",
        "one",
        "",
    ]
    assert len({canonical(text) for text in texts}) == len(texts)


@given(st.decimals(min_value=-(10**12), max_value=10**12, places=4))
@settings(max_examples=200, deadline=None)
def test_a_number_is_its_value_however_it_is_written(number: object) -> None:
    """Against Python's own way to write decimals."""
    assert canonical(f"{number:,}") == canonical(f"{number:f}") == canonical(f"{number:.9f}")
    assert canonical(f"{number:f}") != canonical(f"{number + 1:f}")
