"""Runs on the cluster, started with the commands of a user, and what they write."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launching
from cluster import Cluster, wait_until

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
START_S = 300  # a rank's imports take 10 s on two idle cores
WRITER = "mirage-writer"  # the name of a process, see mirage_ds/checkpoint/writer.py
TIMEOUT_S = 20  # of a collective
# Longer than any test runs, and with the same samples in each step on any number of ranks.
ENDLESS = ("train.max_steps=1000", "train.global_batch_size=4", "train.gradient_accumulation_steps=null")


@dataclass
class Run:
    """A run folder, and the job that writes it."""

    cluster: Cluster
    dir: Path
    number: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return read(self.dir / "metrics.jsonl")

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    @property
    def starts(self) -> int:
        return int(self.job["Restarts"])

    @property
    def folder(self) -> Path:
        """RUN/jobs/N of the newest job."""
        return max((self.dir / "jobs").iterdir(), key=lambda path: int(path.name))

    @property
    def log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else "no log yet"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return read(self.folder / "attempts.jsonl")

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints."""
        names = [path.name.removeprefix("global_step") for path in (self.dir / "checkpoints").glob("global_step*")]
        return sorted(int(name) for name in names if name.isdecimal())

    @property
    def checkpoint(self) -> int:
        return max(self.checkpoints, default=0)

    def ranks(self, node: str) -> list[int]:
        """Process ids of the ranks there; with `data.num_workers=0` only their writers have the same command line."""
        return [number for number, name in self._processes(node).items() if name != WRITER]

    def hold_writers(self, node: str) -> list[int]:
        """Stops the processes that write checkpoints in the background there, so that a save stays under way."""
        held = [number for number, name in self._processes(node).items() if name == WRITER]
        for number in held:
            os.kill(number, signal.SIGSTOP)
        return held

    def _processes(self, node: str) -> dict[int, str]:
        """Names of the processes with a rank's command line, by number."""
        found = {}
        for number, words in self.cluster.processes(node).items():
            if "-m mirage_ds.train" in words and "srun" not in words:
                with suppress(FileNotFoundError):  # it has just ended
                    found[number] = Path(f"/proc/{number}/comm").read_text().strip()
        return found

    def wait_for_save(self) -> None:
        """Until a checkpoint is being written."""
        parts = (self.dir / "checkpoints").glob
        wait_until(lambda: any(parts("*.part")), "a checkpoint that is being written", START_S, self.details)

    def details(self) -> str:
        return f"{self.job}\n{self.log[-6000:]}\n{self.attempts}"

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.step >= step or self.over, f"step {step}", START_S, self.details)
        assert self.step >= step, self.details()

    @property
    def over(self) -> bool:
        return self.job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED")

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        wait_until(lambda: self.over, f"{self.dir.name} {state}", START_S, self.details)
        assert self.job["JobState"] == state, self.details()

    def wait_for_restart(self, before: int, deadline_s: float = START_S) -> None:
        """Until the job has been requeued once more than `before` times."""
        wait_until(lambda: self.starts > before, "requeued", deadline_s, self.details)


@dataclass
class Ground:
    """The folder of the data and runs, and the cluster."""

    folder: Path
    cluster: Cluster

    def recipe(self, stage: str, name: str, *more: str) -> list[str]:
        return [
            str(RECIPES / f"tiny-{stage}.yaml"),
            f"model.path={self.folder / 'model'}",
            f"data.shards={self.folder / 'shards'}",
            f"run.dir={self.folder / name}",
            *more,
        ]

    def submit(
        self, stage: str, name: str, *more: str, nodes: int = 2, ranks: int = 1, options: tuple[str, ...] = ()
    ) -> Run:
        recipe = self.recipe(stage, name, *more)
        return submit(self.cluster, self.folder, *recipe, nodes=nodes, ranks=ranks, options=options)

    def unbroken(self, stage: str, name: str, *more: str, until: int) -> list[dict[str, Any]]:
        """The records of an uninterrupted run without a cluster, stopped after step `until`."""
        metrics, log = self.folder / name / "metrics.jsonl", self.folder / f"{name}.log"
        with launching.start(2, *self.recipe(stage, name, *more), log=log) as ranks:
            reached = lambda: ranks.code is not None or len(read(metrics)) >= until  # noqa: E731
            wait_until(reached, f"step {until}", START_S + 3 * until, log.read_text)
            ranks.send_signal(signal.SIGTERM)
            ranks.finish(timeout_s=START_S)
        return read(metrics)


def submit(
    cluster: Cluster, cwd: Path, *recipe: str, nodes: int = 2, ranks: int = 1, options: tuple[str, ...] = ()
) -> Run:
    """`mirage-launch slurm RECIPE ...` on the login machine."""
    where = ("--nodes", str(nodes), "--ranks-per-node", str(ranks), *options)
    output = mirage_launch(cluster, cwd, "slurm", *where, *recipe).stdout
    number = re.search(r"^submitted +job (\d+)", output, re.MULTILINE)
    script = re.search(r"^script +(\S+)", output, re.MULTILINE)
    assert number, output
    assert script, output
    return Run(cluster, Path(script[1]).parents[2], number[1])


def mirage_launch(cluster: Cluster, cwd: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    # HOME: ignore this user's own cluster file
    environment = launching.environment() | {"HOME": str(cluster.folder)}
    return cluster.run(str(launching.BIN / "mirage-launch"), *arguments, environment=environment, cwd=cwd, code=code)


def read(file: Path) -> list[dict[str, Any]]:
    """JSON lines; none without a file. An incomplete last line is skipped."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
