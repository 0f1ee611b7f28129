"""Answers for tests of rates, tables and comparisons: one for each mark of a pattern."""

from typing import Any

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.tasks.outcome import Outcome

SCORES = {"x": 1.0, ".": 0.0, "h": 0.5}
ANSWER = Answer(  # with two latents, without scores
    number=0,
    where="rows.jsonl:1",
    arm="own",
    sample=0,
    text="go right",
    num_tokens=9,
    num_blocks=1,
    num_latents=2,
    num_replaced=0,
    latents_at=[3, 3],
    complete=True,
)


def answer(number: int, mark: str, **changes: Any) -> Answer:
    """x: right, . : wrong, h: half right, ?: cannot be scored."""
    fields: dict[str, Any] = {
        "number": number,
        "where": f"data/test.jsonl:{number + 1}",
        "arm": "own",
        "sample": 0,
        "text": f"so \\boxed{{{mark}}}",
        "num_tokens": 9,
        "num_blocks": 1,
        "num_latents": 4,
        "num_replaced": 0,
        "latents_at": [],
        "complete": True,
        "row": {"id": number},
    }
    if mark == "?":
        fields["unscored"] = "no right answer"
    else:
        fields["scores"] = {"exact": Outcome(SCORES[mark], "", mark), "other": Outcome(1.0, "")}
    return Answer(**fields | changes)


def answers(pattern: str, **changes: Any) -> list[Answer]:
    """One answer to each row."""
    return [answer(number, mark, **changes) for number, mark in enumerate(pattern)]


def several(*patterns: str, **changes: Any) -> list[Answer]:
    """Several answers to each row: a pattern per row."""
    return [
        answer(number, mark, sample=sample, **changes)
        for number, pattern in enumerate(patterns)
        for sample, mark in enumerate(pattern)
    ]
