"""The results file of an evaluation, while it is written and when it is complete."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import DataError, name_unwritable
from mirage_ds.inference.tasks import vsp
from mirage_ds.owner import of_output
from mirage_ds.versions import versions

Scores = dict[str, vsp.Outcome]
"""Outcome by way of scoring; quote the first way."""
Rates = dict[str, dict[str, dict[str, Any]]]
"""{level: {way of scoring: {"rate", "low", "high", "num_rows"}}}, with the level "all" last."""


@dataclass
class Answer:
    """The model's answer to one row."""

    where: str  # file:line
    text: str
    num_tokens: int  # emitted tokens, latents included
    num_latents: int
    num_replaced: int  # latents that were fed something other than the row's own state
    complete: bool  # it ended by itself; otherwise max_new_tokens cut it off
    level: str
    scores: Scores
    row: dict[str, Any]  # the row's own fields


class Results:
    """A results file: FILE.part gets a line per answer, and is renamed to FILE when it is complete."""

    def __init__(self, output: Path) -> None:
        """Writes nothing yet.

        Raises:
            DataError: the file exists, or cannot be written.
        """
        output = output.resolve()  # a symbolic link stays one
        self.output, self.summary = output, Path(f"{output}.summary.json")
        self.answers: list[Answer] = []
        for path in (self.output, self.summary):
            if path.exists():
                raise DataError(
                    f"the file exists already ({path}, --output); results need a new file; delete it, or name another"
                )
        self.part = Path(f"{output}.part")
        self._owner = of_output(output)
        existing = next(folder for folder in output.parents if folder.exists())
        # Found before the rows are answered.
        with name_unwritable(self.part, "name another --output"), tempfile.TemporaryFile(dir=existing):
            pass

    def __enter__(self) -> "Results":
        """Starts the file.

        Raises:
            DataError: it cannot be written.
            OwnerError: another evaluation writes it.
        """
        with name_unwritable(self.part, "name another --output"):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._owner.claim()
            self._file = self.part.open("w")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._owner.release()

    def add(self, answer: Answer) -> None:
        """Writes one line."""
        self.answers.append(answer)
        self._file.write(strict_json.dumps(asdict(answer)) + "\n")
        self._file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Renames FILE.part to FILE, and writes FILE.summary.json with the versions added."""
        self._owner.check()
        self.summary.write_text(strict_json.dumps(summary | {"versions": versions()}, indent=2))
        self.part.replace(self.output)
