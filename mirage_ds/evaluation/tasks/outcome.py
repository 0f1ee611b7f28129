"""How an answer was scored."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One score."""

    success: float  # 1 for a right answer, 0 for a wrong one; a task of the user's own may have others
    status: str  # in words, such as "Right" or "Fell in hole"
    given: str = ""  # what the answer was read as, for the vote of several: a letter, moves; empty: it says nothing


Scores = dict[str, Outcome]
"""Outcome by way of scoring; quote the first way."""
