"""What the section `evaluation` of a recipe names, checked before a run starts, without reading all rows. No torch."""

from pathlib import Path

from mirage_ds.config import EvaluationConfig
from mirage_ds.data.rows import read_json_lines
from mirage_ds.data.shards import load_manifest
from mirage_ds.errors import DataError
from mirage_ds.evaluation.latents.arms import Arm, parse_arms
from mirage_ds.evaluation.scoring import check_task

TASK, LATENTS = "evaluation.task=", "evaluation.latents="


def check_named(evaluation: EvaluationConfig) -> None:
    """Refuses an evaluation in training that could not be made.

    Raises:
        ConfigError: the task, its file or function, or an arm does not exist.
        DataError: the rows cannot be read.
    """
    check_scoring(evaluation)
    if evaluation.rows is not None:
        check_rows(evaluation.rows)


def check_scoring(evaluation: EvaluationConfig) -> None:
    """The part that needs no rows, which a plan has not: task and arms.

    Raises:
        ConfigError: the task, its file or function, or an arm does not exist.
    """
    if evaluation.task is not None:
        check_task(evaluation.task, TASK)
        arms_of(evaluation)


def check_rows(rows: Path) -> None:
    """Whether there are rows.

    Raises:
        DataError: the file cannot be read or its first row is none, or the folder has no complete shards.
    """
    try:
        if rows.is_dir():
            load_manifest(rows)
        else:
            next(read_json_lines(rows))
    except DataError as error:
        raise DataError(f"evaluation.rows={rows}: {error}") from error


def arms_of(evaluation: EvaluationConfig) -> list[Arm]:
    """The arms of `evaluation.latents`.

    Raises:
        ConfigError: one does not exist.
    """
    return parse_arms(evaluation.latents, setting=LATENTS)
