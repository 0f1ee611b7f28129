"""The rows that are asked, and the answers to them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.tasks.outcome import Outcome, Scores


class Row(NamedTuple):
    """A question of the file."""

    number: int  # in the file, from 0
    where: str  # file:line
    sample: Sample


@dataclass
class Answer:
    """The model's answer to one row: a line of the results file."""

    number: int  # of the row
    where: str  # file:line of the row
    arm: str  # what was replaced: "own" for nothing, "mean", "image:gray"
    sample: int  # of the row's answers in this arm, from 0
    text: str
    num_tokens: int  # emitted tokens, latents included
    num_blocks: int  # latent blocks that it opened
    num_latents: int
    num_replaced: int  # latents that were fed something other than the row's own state
    complete: bool  # it ended by itself; otherwise max_new_tokens cut it off
    latents_at: list[int] = field(default_factory=list)  # of each latent: the characters of the text before it
    scores: Scores = field(default_factory=dict)  # by way of scoring; empty: not scored
    unscored: str = ""  # why it could not be scored
    row: dict[str, Any] = field(default_factory=dict)  # the row's own fields


def answer_of(record: dict[str, Any]) -> Answer:
    """An answer from its line.

    Raises:
        TypeError, AttributeError: a field is missing, unknown, or no object.
    """
    scores = {way: Outcome(**outcome) for way, outcome in record.get("scores", {}).items()}
    return Answer(**record | {"scores": scores})
