"""The questions of an evaluation in training: some of the rows of a JSONL file or of a folder of shards.

They are read once, before the model is loaded, with all their images: what is wrong ends the run before it begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirage_ds.config import Config, EvaluationConfig
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import check_prompt, decode_images, read_json_lines, read_question
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.spread import spread
from mirage_ds.data.stream import SampleReader
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import Arm, check_arms
from mirage_ds.evaluation.latents.replacements import check_targets
from mirage_ds.evaluation.scoring import Task, load_task, unscorable
from mirage_ds.evaluation.training.named import LATENTS, TASK, arms_of
from mirage_ds.training.start import make_encoder
from mirage_ds.zero3 import distributed


@dataclass(frozen=True)
class Questions:
    """What is asked in every evaluation of a run."""

    task: Task
    arms: Sequence[Arm]
    rows: Sequence[Row]
    encoder: Encoder  # of stage 1, which encodes helper images too


def read_evaluation(config: Config) -> Questions | None:
    """The run's questions; None if it evaluates nothing. To be called before the model is loaded.

    Raises:
        MirageError: the task or an arm is unknown, a row cannot be asked, or there is no target for the arm oracle.
    """
    evaluation = config.evaluation
    if evaluation.task is None:
        return None
    task, arms = load_task(evaluation.task, TASK), arms_of(evaluation)
    rows = read_some(evaluation, arms)
    unscored, encoder = unscorable(rows, task), make_encoder(config, "stage1")
    no_targets = check_targets(encoder, rows, arms)
    if distributed.is_main():
        for row, reason in unscored:
            print(f"not scored: {row.where}: {reason}", flush=True)
        if no_targets:
            print(no_targets, flush=True)
    return Questions(task, arms, rows, encoder)


def read_some(config: EvaluationConfig, arms: Sequence[Arm]) -> list[Row]:
    """At most `evaluation.max_rows` rows, evenly spaced, each with its number among all of them.

    Raises:
        DataError: one cannot be asked, or they have too little for an arm.
    """
    assert config.rows is not None, "called where there are rows"
    read = _of_shards if config.rows.is_dir() else _of_file
    rows = read(config.rows, config.max_rows)
    for row in rows:
        decode_images(row.sample, row.where)
    check_arms(arms, rows, f"evaluation.rows={config.rows}", LATENTS)
    return rows


def _of_file(path: Path, max_rows: int) -> list[Row]:
    lines = list(read_json_lines(path))
    return [
        Row(number, where, read_question(row, key=f"{number:09d}", where=where, folder=path.parent, helpers=True))
        for number in spread(len(lines), max_rows)
        for where, row in [lines[number]]
    ]


def _of_shards(folder: Path, max_rows: int) -> list[Row]:
    shards = load_manifest(folder)
    read = SampleReader(shards)
    rows = [
        Row(number, sample.key, replace(sample, key=f"{number:09d}"))  # a key that is made as a file's rows have it
        for number in spread(shards.num_samples, max_rows)
        for sample in [read(number)]
    ]
    for row in rows:
        check_prompt(row.sample, row.where)
    return rows
