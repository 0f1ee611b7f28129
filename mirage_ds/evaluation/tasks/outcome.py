"""How an answer was scored."""

from dataclasses import dataclass

INVALID = "Invalid"
"""The status of an answer whose form is wrong: it gives nothing that could be right."""


@dataclass(frozen=True)
class Outcome:
    """One score."""

    success: float  # 1 for a right answer, 0 for a wrong one; a task of the user's own may have others
    status: str  # in words, such as "Right" or "Fell in hole"
    given: str = ""  # what the answer was read as, to vote and to compare: a letter, moves; empty: it says nothing
    expected: str = ""  # the row's right answer in the same form; empty: there may be several


Scores = dict[str, Outcome]
"""Outcome by way of scoring; quote the first way."""
