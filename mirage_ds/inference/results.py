"""Decodes the questions of a JSONL file and scores the answers, level by level."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mirage_ds.config import TaskName
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.errors import DataError, name_unwritable
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.rates import wilson_interval
from mirage_ds.inference.tasks import choice, vsp
from mirage_ds.versions import versions

Scores = dict[str, vsp.Outcome]
"""Outcome by way of scoring; the first way is the one to quote."""
Rates = dict[str, dict[str, dict[str, Any]]]
"""{level: {way of scoring: {"rate", "low", "high", "num_rows"}}}, with the level "all" last."""


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


@dataclass
class Answer:
    """What the model made of one row."""

    where: str  # file:line
    text: str
    num_tokens: int  # that were emitted, latents among them
    num_latents: int  # states that were fed back
    complete: bool  # it ended by itself; if not, max_new_tokens cut it off
    level: str
    scores: Scores
    row: dict[str, Any]  # the row's own fields


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


class Results:
    """A results file in the making: FILE.part grows with each answer and becomes FILE when all are there."""

    def __init__(self, output: Path) -> None:
        """Writes nothing yet.

        Raises:
            DataError: the file is there already.
        """
        self.output, self.summary = output, Path(f"{output}.summary.json")
        self.answers: list[Answer] = []
        for path in (self.output, self.summary):
            if path.exists():
                raise DataError(
                    f"{path} is there already (--output); results need a new file; delete it or name another"
                )
        self.part = Path(f"{output}.part")

    def __enter__(self) -> "Results":
        """Begins the file.

        Raises:
            DataError: it cannot be written.
        """
        with name_unwritable(self.part, "name another --output"):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("w")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """Writes one line."""
        self.answers.append(answer)
        self._file.write(json.dumps(asdict(answer)) + "\n")
        self._file.flush()

    def finish(self, settings: dict[str, Any]) -> Rates:
        """Gives the file its name, and writes the rates, and what they were measured with, beside it."""
        rates = success_rates(self.answers)
        self.summary.write_text(json.dumps({"rates": rates, "settings": settings, "versions": versions()}, indent=2))
        self.part.replace(self.output)
        return rates


def success_rates(answers: Iterable[Answer]) -> Rates:
    """The share of right answers, and its 95 % interval."""
    answers = list(answers)
    names = sorted({answer.level for answer in answers}, key=lambda level: (len(level), level))
    levels = {name: [answer for answer in answers if answer.level == name] for name in names} | {"all": answers}
    return {level: {way: _rate(part, way) for way in part[0].scores} for level, part in levels.items()}


def _rate(answers: Sequence[Answer], way: str) -> dict[str, Any]:
    successes = sum(answer.scores[way].success for answer in answers)
    low, high = wilson_interval(successes, len(answers))
    return {"rate": successes / len(answers), "low": low, "high": high, "num_rows": len(answers)}


def table(rates: Rates, task: TaskName) -> Table:
    """Rates by level, each with its 95 % interval."""
    drawn = Table(title=task)
    ways = list(rates["all"])
    for heading in ("level", "rows", *(text for way in ways for text in (way, "95% interval"))):
        drawn.add_column(heading, justify="right")
    for level, by_way in rates.items():
        if level == "all":
            drawn.add_section()
        figures = [text for way in ways for text in _figures(by_way[way])]
        drawn.add_row(level, str(by_way[ways[0]]["num_rows"]), *figures)
    return drawn


def _figures(rate: dict[str, Any]) -> tuple[str, str]:
    return f"{rate['rate']:.1%}", f"{rate['low']:.1%} - {rate['high']:.1%}"
