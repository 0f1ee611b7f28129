"""The results file of an evaluation, in the making and complete."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError, name_unwritable
from mirage_ds.inference.tasks import vsp
from mirage_ds.versions import versions

Scores = dict[str, vsp.Outcome]
"""Outcome by way of scoring; the first way is the one to quote."""
Rates = dict[str, dict[str, dict[str, Any]]]
"""{level: {way of scoring: {"rate", "low", "high", "num_rows"}}}, with the level "all" last."""


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

    def finish(self, rates: Rates, settings: dict[str, Any]) -> None:
        """Gives the file its name, and writes the rates, and what they were measured with, beside it."""
        self.summary.write_text(json.dumps({"rates": rates, "settings": settings, "versions": versions()}, indent=2))
        self.part.replace(self.output)
