"""The questions of an evaluation in training: some of the rows of a JSONL file or of a folder of shards.

They are read once, before the model is loaded, with all their images: what is wrong ends the run before it begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirage_ds.config import Config, EvaluationConfig
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import check_question, decode_images, read_json_lines, read_question
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import Arm, check_arms, parse_arms
from mirage_ds.evaluation.latents.replacements import check_targets
from mirage_ds.evaluation.scoring import Task, load_task, unscorable
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.micro_batch import usable_bytes
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.workload import workload
from mirage_ds.training.start import Start, make_encoder
from mirage_ds.training.validation import spread
from mirage_ds.zero3 import distributed

GIB = 2**30


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
    task, arms = load_task(evaluation.task), parse_arms(evaluation.latents)
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
    check_arms(arms, rows, f"evaluation.rows={config.rows}")
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
        check_question(row.sample, row.where)
    return rows


def describe_evaluation(config: Config, start: Start, questions: Questions) -> str:
    """How much memory an evaluation takes by the planner's formulas, for the start of the log; all ranks call it."""
    row, ranks = workload(config).largest_of(config.rows_per_micro_batch), distributed.world_size()
    memory = estimate_memory(model_sizes(config.model), config, start.deepspeed_config, row, ranks)
    needed, limit = memory.resident + memory.evaluation, usable_bytes(start.device)
    every = f"Every {config.evaluation.interval} steps answers {len(questions.rows)} questions"
    arms = ", ".join(arm.name for arm in questions.arms)
    text = (
        f"{every} (task {questions.task.name}; latents {arms}), for which each rank gathers the whole model: about "
        f"{memory.evaluation / GIB:.2f} GiB with the cache of {config.evaluation.batch_size} answers"
    )
    if needed <= limit:
        return text
    return (
        f"{text}\nWARNING: with what stays on a rank that is {needed / GIB:.1f} GiB, of {limit / GIB:.1f} that may be "
        "used: evaluations may run out of memory; set evaluation.batch_size or evaluation.max_new_tokens lower, use "
        "more ranks, or unset evaluation.task and evaluate exports"
    )
