"""The tasks: how the answers to a file's rows are scored, once all are there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from mirage_ds.data.rows import Sample
from mirage_ds.data.texts import OUTPUT_IMAGE_TAG
from mirage_ds.data.turns import turn_fields
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.evaluation.tasks import choice, exact, own, reasoning, vsp
from mirage_ds.evaluation.tasks.outcome import Scores
from mirage_ds.paths import expand

NO_TASK = "none"  # answers are not scored
Share = list[tuple[Scores, str]]
"""What one rank scores: of each of its answers the scores, and why it has none."""


@dataclass(frozen=True)
class Task:
    """A way to score."""

    name: str
    score: Callable[[Sample, str], Scores]  # DataError: the row cannot be scored
    ways: tuple[str, ...]  # of scoring, the one to quote first; empty: answers are not scored
    has_invalid: bool = True  # an answer may have the status INVALID in the first way
    file_digest: str | None = None  # SHA-256 of the file of a user's own


def fields_of(sample: Sample) -> dict[str, Any]:
    """The fields of a row, without its images and latent_size; of several turns also the last question and answer."""
    turns = turn_fields(sample.turns) if sample.context else {}
    return {"text_input": sample.text_input, "text_output": sample.text_output, **turns, **sample.extra}


def _compared(sample: Sample) -> dict[str, Any]:
    """The fields of a row without the slots of helper images: a latent block is no text in an answer either."""
    return fields_of(sample) | {"text_output": sample.text_output.replace(OUTPUT_IMAGE_TAG, "")}


def score_planning(sample: Sample, answer: str) -> Scores:
    """The moves in the last box, walked on the row's `map_desc`: strictly parsed, and as the reference parses them."""
    if "map_desc" not in sample.extra:
        raise DataError(
            "no field map_desc (in a row that is to be scored); expected the map, a square list of rows; add it, or "
            "name another task: such a row may be one of vsp-spatial-reasoning"
        )
    return {mode: vsp.score(sample.extra["map_desc"], answer, mode) for mode in ("strict", "reference")}


def score_reasoning(sample: Sample, answer: str) -> Scores:
    """The letter in the last box against the letter in the row's `text_output`."""
    return {"exact": reasoning.score(sample.text_output, answer)}


def score_choice(sample: Sample, answer: str) -> Scores:
    """The option that is given against the row's."""
    return {"choice": choice.score(_compared(sample), answer)}


def score_exact(sample: Sample, answer: str) -> Scores:
    """The text or number that is given against the row's."""
    return {"exact": exact.score(_compared(sample), answer)}


def score_own(function: own.Function, sample: Sample, answer: str) -> Scores:
    """What the user's function returns."""
    return {"score": own.score(function, sample.key, fields_of(sample), answer)}


TASKS = {
    task.name: task
    for task in (
        Task("vsp-spatial-planning", score_planning, ("strict", "reference")),
        Task("vsp-spatial-reasoning", score_reasoning, ("exact",)),
        Task("choice", score_choice, ("choice",)),
        Task("exact", score_exact, ("exact",)),
        Task(NO_TASK, lambda sample, answer: {}, (), has_invalid=False),
    )
}


def load_task(name: str, setting: str = "--task ") -> Task:
    """The task of this name, or with the function of a user's file.

    Args:
        setting: what names it, for messages.

    Raises:
        ConfigError: there is none, or the file or function cannot be used.
    """
    if name in TASKS:
        return TASKS[name]
    loaded = own.load_function(*_split(name, setting), setting)
    return Task(name, partial(score_own, loaded), ("score",), has_invalid=False, file_digest=loaded.file_digest)


def check_task(name: str, setting: str) -> None:
    """Refuses a task that does not exist, without executing the user's file: see `load_task`.

    Raises:
        ConfigError: there is no such task, file or function.
    """
    if name not in TASKS:
        own.check_function(*_split(name, setting), setting)


def _split(name: str, setting: str) -> tuple[Path, str]:
    """The file and the function of a task of the user's own."""
    file, _, function = name.rpartition(":") if ":" in name else (name, "", "")
    if not file.endswith(".py"):
        raise ConfigError(
            f"unknown task {name!r:.80} ({setting.strip(' =')}); expected one of {', '.join(TASKS)}, or "
            "my_file.py:function; correct the name"
        )
    path = Path(expand(file))
    if not function:
        raise own.no_function_named(path, setting)
    return path, function


def unscorable(rows: Sequence[Row], task: Task) -> list[tuple[Row, str]]:
    """The rows that cannot be scored, each with the reason; call it before decoding.

    Raises:
        ConfigError: the function of a user's own task fails.
        DataError: no row can be scored.
    """
    found = []
    for row in rows:
        try:
            task.score(row.sample, "")
        except DataError as error:
            found.append((row, str(error)))
        except ConfigError as error:
            raise ConfigError(f"{row.where}: {error}") from error
    if rows and len(found) == len(rows):
        raise DataError(f"no row can be scored as {task.name}; the first, {rows[0].where}: {found[0][1]}")
    return found


def score_share(
    arms: Mapping[str, Sequence[Answer]],
    rows: Sequence[Row],
    task: Task,
    ranks: Ranks,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Share:
    """Scores this rank's share of the answers: a function that asks a judge may take seconds for each.

    Args:
        arms: the answers of each arm as decoded, in the same order on every rank.
        rows: that were asked.
        progress: called after each answer with the number that this rank has scored, and with that of its share.

    Raises:
        ConfigError: the function of a user's own task fails.
    """
    by_number = {row.number: row for row in rows}
    answers = [answer for arm in arms.values() for answer in arm][ranks.rank :: ranks.size]
    share: Share = []
    for answer in answers:
        share.append(_score(answer, by_number[answer.number], task))
        progress(len(share), len(answers))
    return share


def scored(arms: Mapping[str, Sequence[Answer]], shares: Sequence[Share]) -> dict[str, list[Answer]]:
    """The answers of each arm with their scores.

    Args:
        arms: as given to `score_share`.
        shares: of all ranks, in their order.
    """
    size = len(shares)
    in_order = (shares[number % size][number // size] for number in count())
    return {
        name: [
            replace(answer, scores=scores, unscored=unscored)
            for answer, (scores, unscored) in zip(arm, islice(in_order, len(arm)), strict=True)
        ]
        for name, arm in arms.items()
    }


def _score(answer: Answer, row: Row, task: Task) -> tuple[Scores, str]:
    try:
        return task.score(row.sample, answer.text), ""
    except DataError as error:
        return {}, str(error)
    except ConfigError as error:
        raise ConfigError(f"{row.where}: {error}") from error
