"""Multiple choice: any options, every way to give one, and nothing guessed."""

from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.choice import options_of, read_option, score

ROW = {"options": ["red cube", "blue cube", "green ball"], "answer": "B"}


@pytest.mark.parametrize(
    "answer",
    [
        *("B", "b", "B.", "(B)", "B)", "(b).", "B:", "option B", "**B**", "$B$"),
        *("blue cube", "Blue  cube.", "B. blue cube", "(B) Blue cube", "B: blue cube"),
        *("The answer is B.", "Answer: (B)", "**Answer:** B. blue cube", "A? B? C?\nAnswer:\nB"),
        *("\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{blue cube}", "\\boxed{(B)}", "Answer: A, no: \\boxed{B}"),
        "<think> A or C? </think> B",
    ],
)
def test_right_answers(answer: str) -> None:
    outcome = score(ROW, answer)
    assert (outcome.success, outcome.status, outcome.given) == (1, "Right", "B")


@pytest.mark.parametrize("answer", ["A", "red cube", "(C)", "\\boxed{B} no, \\boxed{A}", "C. green ball"])
def test_wrong_answers(answer: str) -> None:
    outcome = score(ROW, answer)
    assert (outcome.success, outcome.status) == (0, "Wrong")


@pytest.mark.parametrize(
    "answer",
    [
        *("", "D", "A or B", "A, B", "B or not", "cube", "A blue cube", "not B", "Answer: not B"),
        "B. red cube",  # the letter of one, the text of another
        "Answer: B because it is blue",
        *("\\boxed{B", "Answer: B, \\boxed{", "\\boxed{}", "\\boxed{A, B}", "BB", "1"),
    ],
)
def test_what_is_not_clear_is_invalid(answer: str) -> None:
    assert score(ROW, answer).status == "Invalid"


def test_an_option_that_is_the_letter_of_another() -> None:
    options = {"A": "cat", "B": "A", "C": "C"}
    assert read_option("A", options) is None
    assert read_option("B. A", options) == "B"
    assert read_option("C", options) == "C"
    assert read_option("cat", options) == "A"


def test_options_that_are_numbers() -> None:
    row = {"options": [2, 3.5, 1000], "answer": "1,000"}
    assert score(row, "\\boxed{1000.0}").status == "Right"
    assert score(row, "C").status == "Right"
    assert score(row, "3.50").status == "Wrong"
    assert score(row, "2 cm").status == "Invalid"


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"options": ["x", "y"]}, {"A": "x", "B": "y"}),
        ({"options": {"a": "x", "C ": "y"}}, {"A": "x", "C": "y"}),
        ({"options": ["A. x", "B) y", "(C) z"]}, {"A": "x", "B": "y", "C": "z"}),
        ({"options": ["B. x", "A. y"]}, {"A": "B. x", "B": "A. y"}),
        ({"options": list(ascii_uppercase)}, dict(zip(ascii_uppercase, ascii_uppercase, strict=True))),
        ({"text_input": "Which?\nA. on it\nB. in a hole \nThink."}, {"A": "on it", "B": "in a hole"}),
        ({"text_input": "<image> Which? (A) red one (B) blue"}, {"A": "red one", "B": "blue"}),
        ({"text_input": "From A. to B?\nA) x\nB) y\nC) z"}, {"A": "x", "B": "y", "C": "z"}),
        ({"text_input": "Which?\nA. x C. y\nB. z"}, {"A": "x C. y", "B": "z"}),
        ({"text_input": "A. x\nB. y", "options": ["1", "2"]}, {"A": "1", "B": "2"}),
    ],
)
def test_options_of_rows(row: dict[str, Any], options: dict[str, str]) -> None:
    assert options_of(row) == options


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": ["x"] * 27}, "options is .* expected a list of 2 to 26 texts"),
        ({"options": ["x"]}, "expected a list of 2 to 26 texts"),
        ({"options": ["x", None]}, "expected a list of 2 to 26 texts"),
        ({"options": ["x", " "]}, "expected a list of 2 to 26 texts"),
        ({"options": {"A": "x", "BC": "y"}}, "an object of letters and texts"),
        ({"options": {"A": "x", "a": "y"}}, "an object of letters and texts"),
        ({"options": "A. x B. y"}, "options is 'A. x B. y'"),
        ({"options": 3}, "options is 3"),
        ({"text_input": "How many?"}, r"lists of options in text_input: 0 .* add the field"),
        ({"text_input": "A. x\nB. y\nNow:\nA. z\nB. w"}, r"lists of options in text_input: 2"),
        ({**ROW, "answer": "D"}, "the right answer is 'D' .* one of the letters A, B, C or an option's text"),
        ({**ROW, "answer": 1}, "the right answer is '1'"),  # from 0, or from 1?
        ({**ROW, "answer": None}, "no field text_output or answer"),
        ({**ROW, "answer": ""}, "the right answer is ''"),
        ({**ROW, "answer": None, "text_output": "A or B"}, "the right answer is 'A or B'"),
    ],
)
def test_rows_that_cannot_be_scored(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(row, "A")


@pytest.mark.parametrize("answer", ["blue cube", "B", "(b)", "B. blue cube"])
def test_the_right_answer_as_it_may_be_written(answer: str) -> None:
    for row in ({"answer": answer}, {"text_output": answer}, {"text_output": f"<think> </think> \\boxed{{{answer}}}"}):
        assert score({"options": ROW["options"], **row}, "B").status == "Right"


words = st.text("bcdfgh jkl", min_size=2, max_size=8).map(str.strip).filter(lambda text: len(text) > 1)
many_options = st.lists(words, min_size=2, max_size=26, unique_by=lambda text: " ".join(text.split()))


@given(many_options, st.data())
@settings(max_examples=150, deadline=None)
def test_every_option_is_read_in_every_way(texts: list[str], data: st.DataObject) -> None:
    """By its letter, text or both; in a box, after "Answer:" or alone; from the field or from the question."""
    place = data.draw(st.integers(0, len(texts) - 1))
    letter, text = ascii_uppercase[place], texts[place]
    form = data.draw(st.sampled_from([letter, letter.lower(), f"({letter})", f"{letter}.", f"{letter}) {text}", text]))
    frames = ["\\boxed{%s}", "Answer: %s", "the answer is %s.", "%s", "x \\boxed{no} \\boxed{%s}"]
    frame = data.draw(st.sampled_from(frames))
    listed = "\n".join(f"{ascii_uppercase[number]}. {option}" for number, option in enumerate(texts))
    for row in ({"options": texts}, {"text_input": f"Which one?\n{listed}\nGive the letter."}):
        for right in range(len(texts)):
            status = score({**row, "answer": ascii_uppercase[right]}, frame % form).status
            assert status == ("Right" if right == place else "Wrong")


@given(many_options, st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_text_names_one_option_or_none(texts: list[str], answer: str) -> None:
    options = dict(zip(ascii_uppercase, texts, strict=False))
    named = read_option(answer, options)
    assert named is None or named in answer.upper() or options[named].casefold() in " ".join(answer.split()).casefold()
