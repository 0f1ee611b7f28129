"""The parts of an evaluation that is under way: what a killed one continues from, with any number of ranks.

FILE.parts/settings.json    what a start that continues must agree with
FILE.parts/oracle.json      the same, for a start with the arm oracle
FILE.parts/rank_N.jsonl     a line for each unit of rank N that is complete: its answers, not scored, and where their
                            states are
FILE.parts/rank_N.states    float32 [states, D]: the own states of rank N's rows

A unit is complete when its line is, and the states that it names. The states are on the disk before the line is. What a
kill has left after the last complete unit is cut off when a rank of the same number starts, and not read by others.
"""

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mirage_ds import strict_json
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Answer, answer_of
from mirage_ds.evaluation.latents.states import FLOAT_BYTES, States
from mirage_ds.inference.feed import Slot


@dataclass
class Decoded:
    """An answer without its scores, and the states that its row made in the arm `own`."""

    answer: Answer
    key: str
    states: dict[Slot, torch.Tensor]  # each [D] float32 on the CPU; empty in other arms


def check_settings(folder: Path, settings: dict[str, Any], file: str = "settings.json") -> None:
    """Makes the folder, or refuses one of an evaluation with other settings. For one rank, before the others.

    Args:
        settings: all that decides the answers of an arm, as JSON values.
        file: where they are kept; another one has what decides the answers of some arms only.

    Raises:
        DataError: the first setting that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    if not path.exists():
        new = path.with_suffix(".new")
        new.write_text(strict_json.dumps(settings, indent=2))
        new.replace(path)
    found = strict_json.loads(path.read_text())
    for name in settings | found:
        there, here = found.get(name), settings.get(name)
        if there != here:
            raise DataError(
                f"an unfinished evaluation has {name}={there!r:.80}, this one {name}={here!r:.80} ({folder}); an "
                "evaluation continues with the same settings only; repeat them, or delete the folder, or name another "
                "--output"
            )


def check_left_out(folder: Path, names: Collection[str]) -> None:
    """Refuses to leave out an arm of which answers are there: they would be deleted at the end. Needs no model.

    Args:
        names: of the arms that are asked for.

    Raises:
        DataError: some are left out.
    """
    lines = [line for path in folder.glob("rank_*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    decoded = {json.loads(line)["unit"].partition("/")[0] for line in lines if line.endswith(b"\n")}
    if left_out := sorted(decoded.difference(names)):
        raise DataError(
            f"an unfinished evaluation has answers of arms that this one leaves out: {', '.join(left_out)} "
            f"({folder}, --latents, --image); a start that continues it has the same arms, or more; add them, "
            "or delete the folder, or name another --output"
        )


class Parts:
    """The files of one rank, and reading those of all."""

    def __init__(self, folder: Path, rank: int, state_size: int) -> None:
        """
        Args:
            folder: see `check_settings`.
            state_size: D.
        """
        self.folder, self.state_size = folder, state_size
        path = folder / f"rank_{rank}.jsonl"
        path.touch()
        states = _states_of(path)
        states.touch()
        complete = sum(size for size, _ in self._complete(path))
        self._lines, self._states = path.open("ab"), states.open("ab")
        self._lines.truncate(complete)
        row = FLOAT_BYTES * state_size
        self._num_states = states.stat().st_size // row
        self._states.truncate(self._num_states * row)

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
        os.fsync(self._states.fileno())
        self._lines.write((json.dumps({"unit": unit, "rows": lines}) + "\n").encode())
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def units(self) -> set[str]:
        """The names of all complete units, of all ranks."""
        return {record["unit"] for _, record in self._records()}

    def answers(self) -> list[Answer]:
        """All answers so far, of all ranks; not scored."""
        return [answer_of(row["answer"]) for _, record in self._records() for row in record["rows"]]

    def states(self) -> States:
        """The states so far, of all ranks, by row in the order of the file."""
        rows = [
            (row["answer"]["number"], row["key"], _states_of(path), row["first"], row["slots"])
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
            for _, record in self._complete(path):
                yield path, record

    def _complete(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The complete units of a rank, up to the first one that is not, each with the bytes of its line."""
        with path.open("rb") as file:
            for line in file:
                record = json.loads(line) if line.endswith(b"\n") else None
                if record is None or not self._has_states(path, record):
                    return
                yield len(line), record

    def _has_states(self, path: Path, record: dict[str, Any]) -> bool:
        """Whether the states that a unit names are in the file: a disk may lose what was written last."""
        end = max((row["first"] + len(row["slots"]) for row in record["rows"] if row["slots"]), default=0)
        return end == 0 or _states_of(path).stat().st_size >= end * FLOAT_BYTES * self.state_size

    def close(self) -> None:
        self._lines.close()
        self._states.close()


def _states_of(path: Path) -> Path:
    """The file of the states that a rank's lines name."""
    return path.with_suffix(".states")
