"""The tasks: how the answers to a file's rows are scored."""

from collections.abc import Callable
from dataclasses import dataclass

from mirage_ds.data.rows import Sample
from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.tasks import choice, vsp
from mirage_ds.evaluation.tasks.outcome import Scores


@dataclass(frozen=True)
class Task:
    """A way to score."""

    name: str
    score: Callable[[Sample, str], Scores]  # DataError: the row cannot be scored
    ways: tuple[str, ...]  # of scoring, the one to quote first; empty: answers are not scored


def score_planning(sample: Sample, answer: str) -> Scores:
    """The moves in the last box, walked on the row's `map_desc`: strictly parsed, and as the reference parses them."""
    return {mode: vsp.score(sample.extra.get("map_desc"), answer, mode) for mode in ("strict", "reference")}


def score_reasoning(sample: Sample, answer: str) -> Scores:
    """The letter in the last box against the letter in the row's `text_output`."""
    return {"exact": choice.score(sample.text_output, answer)}


TASKS = {
    task.name: task
    for task in (
        Task("vsp-spatial-planning", score_planning, ("strict", "reference")),
        Task("vsp-spatial-reasoning", score_reasoning, ("exact",)),
        Task("none", lambda sample, answer: {}, ()),
    )
}


def load_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r:.80} (--task); expected one of {', '.join(TASKS)}; correct the name")
    return TASKS[name]
