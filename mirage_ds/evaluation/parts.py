"""The parts of an evaluation that is under way: what a killed one continues from, with any number of ranks.

FILE.parts/settings.json    what a start that continues must agree with
FILE.parts/rank_N.jsonl     a line for each unit of rank N that is complete: its answers, and where their states are
FILE.parts/rank_N.states    float32 [states, D]: the own states of rank N's rows

A unit is complete when its line is. Whatever a kill left behind it is overwritten.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mirage_ds import strict_json
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.states import States
from mirage_ds.evaluation.tasks.outcome import Outcome
from mirage_ds.inference.feed import Slot

FLOAT_BYTES = 4


@dataclass
class Decoded:
    """An answer, and the states that its row made in the arm `own`."""

    answer: Answer
    key: str
    states: dict[Slot, torch.Tensor]  # each [D] float32 on the CPU; empty in other arms


class Parts:
    """The files of one rank, and reading those of all."""

    def __init__(self, folder: Path, rank: int, settings: dict[str, Any], state_size: int) -> None:
        """
        Args:
            settings: all that decides the answers, as JSON values.
            state_size: D.

        Raises:
            DataError: the folder is of an evaluation with other settings.
        """
        self.folder, self.state_size = folder, state_size
        folder.mkdir(parents=True, exist_ok=True)
        self._check(settings)
        self._lines = (folder / f"rank_{rank}.jsonl").open("ab")
        self._lines.truncate(_complete_bytes(folder / f"rank_{rank}.jsonl"))
        self._states_path = folder / f"rank_{rank}.states"
        self._states = self._states_path.open("ab")
        row = FLOAT_BYTES * state_size
        self._num_states = self._states.tell() // row
        self._states.truncate(self._num_states * row)

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            new = path.with_suffix(".new")
            new.write_text(strict_json.dumps(settings, indent=2))
            new.replace(path)
        found = strict_json.loads(path.read_text())
        differing = [name for name, value in settings.items() if found.get(name) != value]
        if differing:
            name = differing[0]
            raise DataError(
                f"an unfinished evaluation has {name}={found.get(name)!r:.80}, this one {name}={settings[name]!r:.80} "
                f"({self.folder}); an evaluation continues with the same settings only; repeat them, or delete the "
                "folder, or name another --output"
            )

    def add(self, unit: str, rows: list[Decoded]) -> None:
        """Writes a complete unit."""
        lines = []
        for row in rows:
            states = list(row.states.values())
            places = {"key": row.key, "first": self._num_states, "slots": [list(slot) for slot in row.states]}
            if states:
                self._states.write(torch.stack(states).numpy().tobytes())
                self._num_states += len(states)
            lines.append({"answer": asdict(row.answer), **places})
        self._states.flush()
        self._lines.write((json.dumps({"unit": unit, "rows": lines}) + "\n").encode())
        self._lines.flush()

    def units(self) -> set[str]:
        """The names of all complete units, of all ranks."""
        return {record["unit"] for _, record in self._records()}

    def answers(self) -> list[Answer]:
        """All answers so far, of all ranks."""
        return [_answer(row["answer"]) for _, record in self._records() for row in record["rows"]]

    def states(self) -> States:
        """The states so far, of all ranks, by row in the order of the file."""
        rows = [
            (row["answer"]["number"], row["key"], path.with_suffix(".states"), row["first"], row["slots"])
            for path, record in self._records()
            for row in record["rows"]
            if row["slots"]
        ]
        return States(
            {
                key: (path, {Slot(*slot): first + place for place, slot in enumerate(slots)})
                for _, key, path, first, slots in sorted(rows)
            },
            self.state_size,
        )

    def _records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield path, json.loads(line)

    def close(self) -> None:
        self._lines.close()
        self._states.close()

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)


def _complete_bytes(path: Path) -> int:
    """The size of a file up to its last complete line."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def _answer(fields: dict[str, Any]) -> Answer:
    scores = {way: Outcome(**outcome) for way, outcome in fields.pop("scores").items()}
    return Answer(**fields, scores=scores)
