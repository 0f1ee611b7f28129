r"""Scores answers to spatial reasoning: the letter in the last \boxed{...}, compared exactly; any from A to Z."""

from string import ascii_uppercase

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.given import extract_boxed
from mirage_ds.evaluation.tasks.outcome import INVALID, Outcome

CHOICES = frozenset(ascii_uppercase)


def extract_choice(text: str) -> str | None:
    """The letter in an answer's last box; None if there is no box, or it holds anything else."""
    boxed = extract_boxed(text)
    return boxed if boxed in CHOICES else None


def score(expected: str, answer: str) -> Outcome:
    """Whether an answer gives the same letter as the row's own text_output: "Right", "Wrong" or "Invalid".

    Raises:
        DataError: the row's text_output gives no letter.
    """
    choice = extract_choice(expected)
    if choice is None:
        raise DataError(
            f"text_output {expected!r:.80} gives no letter (in a row that is to be scored); expected \\boxed{{...}} "
            "with one letter from A to Z; fix the row, or score it as another task"
        )
    given = extract_choice(answer)
    status = INVALID if given is None else "Right" if given == choice else "Wrong"
    return Outcome(given == choice, status, given or "", choice)
