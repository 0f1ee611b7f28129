"""Decodes the questions of a JSONL file and scores the answers, level by level."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mirage_ds.config import TaskName
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.errors import DataError
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.results import Answer, Scores
from mirage_ds.inference.tasks import choice, vsp


def score_planning(sample: Sample, answer: str) -> Scores:
    """The moves in the last box, walked on the row's `map_desc`: strictly parsed, and as the reference parses them."""
    return {mode: vsp.score(sample.extra.get("map_desc"), answer, mode) for mode in ("strict", "reference")}


def score_reasoning(sample: Sample, answer: str) -> Scores:
    """The letter in the last box against that of the row's `text_output`."""
    return {"exact": choice.score(sample.text_output, answer)}


TASKS: dict[TaskName, Callable[[Sample, str], Scores]] = {
    "vsp-spatial-planning": score_planning,
    "vsp-spatial-reasoning": score_reasoning,
}


def read_task(data: Path, task: TaskName) -> list[tuple[str, Sample]]:
    """The rows of a file, each with its file:line, after a look whether all of them can be asked and scored.

    Raises:
        DataError: a row has no question, an image that cannot be read, or not what the task is scored by.
    """
    rows = list(read_questions(data))
    for where, sample in rows:
        try:
            TASKS[task](sample, "")
        except DataError as error:
            raise DataError(f"{where} is no row of {task}: {error}") from error
    return rows


def evaluate(
    decoder: Decoder, encoder: Encoder, rows: Sequence[tuple[str, Sample]], task: TaskName, *, batch_size: int
) -> Iterator[Answer]:
    """Answers and scores rows, `batch_size` at a time, in their order; prompts come from the rows."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate([encoder.prompt(sample) for _, sample in part], align_latents=True)
        for (where, sample), row in zip(part, decoder.generate(batch), strict=True):
            text = encoder.text_of(row.ids).strip()
            yield Answer(
                where=where,
                text=text,
                num_tokens=len(row.ids),
                num_latents=len(row.latents),
                complete=bool(decoder.is_end(torch.tensor(row.ids[-1]))),
                level=level_of(sample),
                scores=TASKS[task](sample, text),
                row=sample.extra,
            )


def level_of(sample: Sample) -> str:
    """A map's side; of rows without a map, their own `level`."""
    map_desc = sample.extra.get("map_desc")
    return str(len(map_desc) if isinstance(map_desc, list) else sample.extra.get("level", "-"))
