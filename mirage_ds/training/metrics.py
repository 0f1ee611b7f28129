"""What a run reports: metrics.jsonl with every step in full precision, and from it TensorBoard and the console line.

Losses stay on the device and are summed over the ranks only when they are due, so that a step never waits for the host.
"""

import json
import statistics
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from mirage_ds import strict_json
from mirage_ds.config import Stage
from mirage_ds.housekeeping import housekeeping, warn_once
from mirage_ds.zero3 import distributed

# metrics.jsonl has all losses in every stage. Only stage 1 has a latent loss, and so a total that is not the text loss
# alone. The text loss comes first: it compares between stages.
CONSOLE_LOSSES: dict[Stage, dict[str, str]] = {
    "text": {"ce_loss": "text"},
    "stage1": {"ce_loss": "text", "latent_loss": "latent", "loss": "loss"},
    "stage2": {"ce_loss": "text"},
}
BAD_BATCHES_NAME = "bad_batches.jsonl"
RECENT_STEPS = 50  # from which the remaining time is estimated
TAGS = {
    "loss": "train/loss",
    "ce_loss": "train/ce_loss",
    "latent_loss": "train/latent_loss",
    "cosine": "train/cosine",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "samples_per_s": "throughput/samples_per_s",
    "tokens_per_s": "throughput/tokens_per_s",
    "step_s": "time/step_s",
    "data_pct": "time/data_pct",
}


@dataclass
class StepSums:
    """One optimizer step as one rank sees it; tensors stay on the device.

    `losses` [3] are sums over this rank's samples: loss, ce_loss, latent_loss.
    """

    step: int
    position: int
    losses: torch.Tensor
    num_grounded_samples: int
    num_tokens: int
    lr: float
    grad_norm: torch.Tensor | float
    skipped_steps: int
    started_s: float
    waited_s: float
    num_faults: int = 0  # samples that could not be used


class Curves:
    """TensorBoard's files. If they cannot be written, there are no more curves in this start."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None
        with self.housekeeping():
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve; `values` by tag."""
        writer, self.writer = self.writer, None
        if writer:
            with self.housekeeping():
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)
                self.writer = writer

    def close(self) -> None:
        if self.writer:
            with self.housekeeping():
                self.writer.close()

    def housekeeping(self) -> AbstractContextManager[None]:
        return housekeeping(f"no more curves are written ({self.folder})", "metrics.jsonl has the same numbers")


class Records:
    """A file with a JSON object per line, in order of steps. If it cannot be written, lines are missing."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path, self.file = path, _open_after(path, steps_done)

    def add(self, *records: dict[str, Any]) -> None:
        with self.housekeeping():
            self.file.writelines(strict_json.dumps(record) + "\n" for record in records)
            self.file.flush()

    def close(self) -> None:
        with self.housekeeping():
            self.file.close()

    def housekeeping(self) -> AbstractContextManager[None]:
        return housekeeping(f"lines are missing ({self.path})", "the log has the same losses")


class Metrics:
    """Collects steps, and writes them when they are due. Every rank calls it; rank 0 writes."""

    def __init__(
        self, run_dir: Path, *, stage: Stage, global_batch_size: int, max_steps: int, log_freq: int, steps_done: int = 0
    ) -> None:
        """
        Args:
            steps_done: a resumed run repeats the steps after its checkpoint, so their earlier records are dropped.
        """
        self.run_dir, self.stage, self.global_batch_size = run_dir, stage, global_batch_size
        self.max_steps, self.log_freq = max_steps, log_freq
        self.pending: list[StepSums] = []
        self.first_step = steps_done + 1
        self.recent_step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.file = self.validation_file = self.bad_batches = self.curves = None
        if distributed.is_main():
            self.file = Records(run_dir / "metrics.jsonl", steps_done)
            self.validation_file = Records(run_dir / "validation.jsonl", steps_done)
            self.bad_batches = Records(run_dir / BAD_BATCHES_NAME, steps_done)
            self.curves = Curves(run_dir / "tensorboard", steps_done)

    def add(self, sums: StepSums) -> None:
        """Takes a step; every `log_freq` steps, and after the last one, writes what is pending."""
        self.pending.append(sums)
        if sums.step % self.log_freq == 0 or sums.step == self.max_steps:
            self.flush()

    def flush(self) -> None:
        """Sums the pending steps over the ranks, in one all-reduce, and writes them."""
        if not self.pending:
            return
        losses = torch.stack([sums.losses for sums in self.pending]).double()
        counts = losses.new_tensor(
            [[sums.num_grounded_samples, sums.num_tokens, sums.num_faults] for sums in self.pending]
        )
        totals = distributed.sum_over_ranks(torch.cat([losses, counts], dim=1)).tolist()
        ends = [sums.started_s for sums in self.pending[1:]] + [time.monotonic()]
        if self.file and self.curves:
            for sums, total, end_s in zip(self.pending, totals, ends, strict=True):
                record = self._record(sums, total, end_s)
                self.file.add(record | {"loss_hex": record["loss"].hex()})
                if sums.step > self.first_step:  # the first step of a start is slow
                    self.recent_step_s.append(record["step_s"])
            tags = {tag: record[name] for name, tag in TAGS.items() if self._has(name) and record[name] is not None}
            self.curves.add(tags, record["step"])
            print(self._console_line(record), flush=True)
        self.pending.clear()

    def add_validation(self, step: int, losses: dict[str, float]) -> None:
        """Writes a validation, whose losses are the same on every rank."""
        if self.validation_file and self.curves:
            hexadecimal = {"loss_hex": losses["loss"].hex()}
            self.validation_file.add({"step": step} | losses | hexadecimal)
            self.curves.add({f"validation/{name}": value for name, value in losses.items() if self._has(name)}, step)
            print(f"step {step:>5}/{self.max_steps} | validation {self._losses(losses)}", flush=True)

    def add_bad_batches(self, step: int, batches: list[dict[str, Any]]) -> Path:
        """Writes the micro-batches of a skipped step, from all ranks, to a file of their own, and returns it."""
        if self.bad_batches:
            self.bad_batches.add(*({"step": step} | batch for batch in batches))
            keys = ", ".join(key for batch in batches for key in batch["keys"])
            print(f"step {step:>5}/{self.max_steps} | skipped: loss or gradient not finite ({keys:.200})", flush=True)
        return self.run_dir / BAD_BATCHES_NAME

    def _record(self, sums: StepSums, total: list[float], end_s: float) -> dict[str, Any]:
        loss, ce_loss, latent_loss, grounded, tokens, faults = total
        step_s = end_s - sums.started_s
        return {
            "step": sums.step,
            "position": sums.position,
            "loss": loss / self.global_batch_size,
            "ce_loss": ce_loss / self.global_batch_size,
            "latent_loss": latent_loss / self.global_batch_size,
            "cosine": 1 - latent_loss / grounded if grounded else None,
            "lr": sums.lr,
            "grad_norm": float(sums.grad_norm),
            "skipped_steps": sums.skipped_steps,
            "replaced_samples": int(faults),
            "samples_per_s": self.global_batch_size / step_s,
            "tokens_per_s": tokens / step_s,
            "step_s": step_s,
            "data_pct": 100 * sums.waited_s / step_s,
        }

    def _has(self, name: str) -> bool:
        """Whether the stage has this loss; a constant 0 is no curve."""
        return name != "latent_loss" or self.stage == "stage1"

    def _losses(self, record: dict[str, Any]) -> str:
        return " | ".join(f"{word} {record[name]:.4f}" for name, word in CONSOLE_LOSSES[self.stage].items())

    def _console_line(self, record: dict[str, Any]) -> str:
        parts = [
            f"step {record['step']:>5}/{self.max_steps}",
            self._losses(record),
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['samples_per_s']:.1f} samples/s",
            f"{record['step_s']:.2f} s",
            f"data {record['data_pct']:.0f}%",
        ]
        steps_left = self.max_steps - record["step"]
        if steps_left and self.recent_step_s:
            # Steps alone: validations and checkpoints take their time on top.
            parts.append(f"{_duration(steps_left * statistics.median(self.recent_step_s))} left")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} steps skipped: gradient not finite")
        return " | ".join(parts)

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.flush()
        for file in (self.file, self.validation_file, self.bad_batches, self.curves):
            if file:
                file.close()


def _open_after(path: Path, step: int) -> TextIO:
    """Opens a file of records for appending; drops those after `step`, and a last line that a kill cut short."""
    if step == 0 and path.exists() and path.stat().st_size:
        kept = path.with_suffix(f".{time.time_ns()}.jsonl")
        path.rename(kept)  # a run that ended before its first checkpoint; this one starts over
        print(f"{kept.name}: what {path.name} had of an earlier start that saved no checkpoint", flush=True)
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    steps = {number: step_of(line) for number, line in enumerate(lines, start=1)}
    bad = [number for number, found in steps.items() if found is None and lines[number - 1].endswith("\n")]
    if bad:
        warn_once(f"{path} has lines that are no records of steps, which are dropped: {', '.join(map(str, bad)):.80}")
    new = path.with_suffix(".new")
    new.write_text("".join(lines[number - 1] for number, found in steps.items() if found is not None and found <= step))
    new.replace(path)
    return path.open("a")


def step_of(line: str) -> int | None:
    """The step of a record; None if the line is none, or was cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if line.endswith("\n") and isinstance(step, int) else None


def _duration(seconds: float) -> str:
    """9.4 -> 9s; 65 -> 1m 05s; 3723 -> 1h 02m."""
    total = round(seconds)
    hours, minutes = total // 3600, total // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {total % 60:02}s" if minutes else f"{total}s"
