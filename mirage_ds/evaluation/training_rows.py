"""The questions of an evaluation in training: some of the rows of a JSONL file or of a folder of shards."""

from collections.abc import Sequence
from pathlib import Path

from mirage_ds.config import EvaluationConfig
from mirage_ds.data.rows import check_question, read_json_lines, read_question
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.arms import Arm, check_rows
from mirage_ds.training.validation import spread


def read_some(config: EvaluationConfig, arms: Sequence[Arm]) -> list[Row]:
    """At most `evaluation.max_rows` rows, evenly spaced, each with its number among all of them.

    Raises:
        DataError: there are none, or one cannot be asked, or they have too little for an arm.
    """
    assert config.rows is not None, "called where there are rows"
    if config.rows.is_dir():
        rows = _of_shards(config.rows, config.max_rows)
    else:
        rows = _of_file(config.rows, config.max_rows, helpers=any(arm.latents == "oracle" for arm in arms))
    if not rows:
        raise DataError(
            f"there are no rows (evaluation.rows={config.rows}); an evaluation needs at least one question; name a "
            "JSONL file or a folder of shards with rows, or unset evaluation.rows and evaluation.task"
        )
    check_rows(arms, rows, f"evaluation.rows={config.rows}")
    return rows


def _of_file(path: Path, max_rows: int, *, helpers: bool) -> list[Row]:
    lines = list(read_json_lines(path))
    return [
        Row(number, where, read_question(row, key=f"{number:09d}", where=where, folder=path.parent, helpers=helpers))
        for number in spread(len(lines), max_rows)
        for where, row in [lines[number]]
    ]


def _of_shards(folder: Path, max_rows: int) -> list[Row]:
    shards = load_manifest(folder)
    read = SampleReader(shards)
    rows = [
        Row(number, sample.key, sample) for number in spread(shards.num_samples, max_rows) for sample in [read(number)]
    ]
    for row in rows:
        check_question(row.sample, row.where)
    return rows
