r"""Scores answers to multiple choice (spatial reasoning): the letter in the last \boxed{...}, compared exactly."""

from mirage_ds.errors import DataError
from mirage_ds.inference.tasks.vsp import Outcome, extract_boxed

CHOICES = ("A", "B", "C")


def extract_choice(text: str) -> str | None:
    """The letter that an answer gives; None if its last box holds anything else, or there is none."""
    boxed = extract_boxed(text)
    return boxed if boxed in CHOICES else None


def score(expected: str, answer: str) -> Outcome:
    """Whether an answer gives the letter that the row's own text_output gives: "Right", "Wrong", or "Invalid".

    Raises:
        DataError: the row's text_output gives none.
    """
    choice = extract_choice(expected)
    if choice is None:
        raise DataError(
            f"text_output {expected!r:.80} gives no choice (in a row that is to be scored); allowed is \\boxed{{...}} "
            f"with one of {', '.join(CHOICES)}; mend the row or score it as another task"
        )
    given = extract_choice(answer)
    return Outcome(given == choice, "Invalid" if given is None else "Right" if given == choice else "Wrong")
