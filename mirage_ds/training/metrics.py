"""What a run reports: every rank collects its steps; when they are due, they are summed and rank 0 writes them.

Losses, and the times of a step's parts, stay on the device until then, so that a step never waits for the host.
"""

import socket
import time
from pathlib import Path
from typing import Any

from mirage_ds.batch import Batch
from mirage_ds.config import Stage
from mirage_ds.training.latent_sums import LatentSums
from mirage_ds.training.planned import Planned
from mirage_ds.training.report import BAD_BATCHES_NAME, Evaluated, Report, Step
from mirage_ds.training.set_losses import SetLosses
from mirage_ds.training.step_sums import StepSums, sum_over_ranks
from mirage_ds.zero3 import distributed


class Metrics:
    """Collects steps, and writes them when they are due. Every rank calls it; rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        *,
        stage: Stage,
        global_batch_size: int,
        max_steps: int,
        log_freq: int,
        steps_done: int = 0,
        planned: Planned | None = None,
        latents: LatentSums | None = None,
        sets: SetLosses | None = None,
    ) -> None:
        """
        Args:
            steps_done: a resumed run repeats the steps after its checkpoint, so their earlier records are dropped.
            planned: what the figures are compared with; without it no FLOPs are counted.
            latents: takes the states of steps that are due, and of those alone.
            sets: takes the losses of all steps, where there are several data sets.
        """
        self.run_dir, self.max_steps, self.log_freq = run_dir, max_steps, log_freq
        self.planned, self.latents, self.sets, self.stage = planned, latents, sets, stage
        self.pending: list[StepSums] = []
        self.first_step = steps_done + 1
        hosts = distributed.gather(socket.gethostname())
        self.report: Report | None = None
        if distributed.is_main():
            self.report = Report(
                run_dir, stage, global_batch_size, max_steps, steps_done, planned, hosts, sets.names if sets else ()
            )

    def flops(self, batch: Batch) -> float:
        """What the mathematics of a batch requires."""
        return self.planned.flops(batch) if self.planned else 0.0

    def begin(self, step: int) -> None:
        """A step begins."""
        if self.latents:
            self.latents.active = self.is_due(step)
        if self.sets:
            self.sets.begin()

    def add(self, sums: StepSums) -> None:
        """Takes a step; every `log_freq` steps, and after the last one, writes what is pending."""
        if self.sets:
            sums.sets = self.sets.take()
        self.pending.append(sums)
        if self.latents:
            self.latents.active = False
        if self.is_due(sums.step):
            self.flush()

    def is_due(self, step: int) -> bool:
        """Whether a step is shown."""
        return step % self.log_freq == 0 or step == self.max_steps

    def flush(self) -> None:
        """Sums the pending steps over the ranks, in one all-reduce, and writes them."""
        if not self.pending:
            return
        totals, ranks = sum_over_ranks(self.pending, self.first_step)
        # A background save may have been completed between two of them, and belongs to neither.
        ends = [sums.started_s - sums.times.host_s.get("save", 0.0) for sums in self.pending[1:]] + [time.monotonic()]
        figures = None
        if self.latents and self.is_due(self.pending[-1].step):
            figures = self.latents.take(targets=self.stage == "stage1")
        if self.report:
            self.report.write([Step(*each) for each in zip(self.pending, totals, ends, strict=True)], ranks, figures)
        self.pending.clear()

    def add_validation(self, step: int, losses: dict[str, float]) -> None:
        """Writes a validation, whose losses are the same on every rank."""
        if self.report:
            self.report.write_validation(step, losses)

    def add_evaluation(self, step: int, evaluated: Evaluated, seconds: float) -> None:
        """Writes an evaluation."""
        if self.report:
            self.report.write_evaluation(step, evaluated, seconds)

    def show_configuration(self, config: dict[str, Any]) -> None:
        """Writes the run's configuration, as JSON values, by section, where curves are shown."""
        if self.report:
            self.report.curves.add_configuration(config)

    def add_bad_batches(self, step: int, batches: list[dict[str, Any]]) -> Path:
        """Writes the micro-batches of a skipped step, from all ranks, to a file of their own, and returns it."""
        if self.report:
            self.report.write_bad_batches(step, batches)
        return self.run_dir / BAD_BATCHES_NAME

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.flush()
        if self.report:
            self.report.close()
