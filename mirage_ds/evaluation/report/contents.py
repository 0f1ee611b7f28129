"""What the report of `mirage inspect` shows, as plain data: made from an evaluation, turned into HTML by page.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["right", "wrong", "scored", "unscored", ""]
"""Of an answer. `scored`: neither 1 nor 0; empty: there is no task."""


@dataclass(frozen=True)
class Estimate:
    """A rate or a difference of rates, with its 95 % interval."""

    value: float
    low: float
    high: float
    text: str  # all three, as a reader sees them


@dataclass(frozen=True)
class ArmResult:
    """A line of the replacement test."""

    name: str
    meaning: str  # what is fed or seen, in a few words
    num_answers: int
    invalid: str  # how many of the scored answers have a wrong form; empty if the task finds none
    num_cut_off: int  # never ended: the limit cut them off
    num_with_block: int  # answers that open a latent block
    success: str  # with its interval; empty without a task
    difference: Estimate | None  # success minus that of `own`; None for `own` itself, and without a task
    changed: Estimate | None  # share of answers that differ from those of `own`; None for `own` itself


@dataclass(frozen=True)
class Measure:
    """A column of the latent health."""

    title: str
    meaning: str  # what it measures, and what is normal
    values: Sequence[float | None]  # by slot; None where it is not defined
    low: float  # where bars start
    high: float  # where they end


@dataclass(frozen=True)
class Health:
    """The states of all rows, slot by slot."""

    slots: Sequence[str]  # BLOCK.PLACE, from 0
    measures: Sequence[Measure]
    warning: str  # empty if nothing is wrong


@dataclass(frozen=True)
class Picture:
    """An image that is part of the page."""

    url: str  # data:
    alt: str
    width: int  # px
    height: int
    caption: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    kind: Literal["same", "added", "removed", "latent"]
    text: str  # of a latent: its slot


@dataclass(frozen=True)
class Reply:
    """One answer to a row."""

    arm: str
    pieces: Sequence[Piece]
    verdict: Verdict
    status: str  # in words, such as "Reached goal"
    complete: bool
    changed: bool  # it differs from that of `own`

    @property
    def same_text(self) -> bool:
        """Whether a replaced answer has the text of the own one; if not, it may still give the same."""
        return all(piece.kind == "same" for piece in self.pieces)


@dataclass(frozen=True)
class RowView:
    """A row with everything that is shown of it."""

    number: int
    where: str
    question: str
    expected: str
    inputs: Sequence[Picture]
    helpers: Sequence[Picture]
    heat: Sequence[Picture]  # by latent, then by input image
    own: Reply
    replaced: Sequence[Reply]

    @property
    def changed_by(self) -> list[str]:
        """The arms with another answer."""
        return [reply.arm for reply in self.replaced if reply.changed]


@dataclass(frozen=True)
class Contents:
    """The page."""

    model: str
    data: str
    date: str
    task: str
    way: str  # of scoring; empty without a task
    num_rows: int
    facts: Mapping[str, str]  # versions and settings
    arms: Sequence[ArmResult]  # `own` first
    has_invalid: bool  # answers may have a wrong form
    chance_level: str  # empty if rows have no single right answer
    warnings: Sequence[str]  # what makes the rates say less than they seem to
    health: Health
    rows: Sequence[RowView]
