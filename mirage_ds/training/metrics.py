"""What a run reports: metrics.jsonl with every step in full precision, and from it TensorBoard and the console line.

Losses stay on the device and are added over the ranks only when they are due, so that a step never waits for the host.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from mirage_ds.zero3 import distributed

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
    """What one rank knows of one optimizer step; tensors stay on the device.

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


class Metrics:
    """Collects steps, and writes them when they are due. Every rank calls it; rank 0 writes."""

    def __init__(
        self, run_dir: Path, *, global_batch_size: int, max_steps: int, log_freq: int, steps_done: int = 0
    ) -> None:
        """
        Args:
            steps_done: a run that goes on writes its later steps again, so what stands there of them is dropped.
        """
        self.global_batch_size, self.max_steps, self.log_freq = global_batch_size, max_steps, log_freq
        self.pending: list[StepSums] = []
        self.file = self.validation_file = self.writer = None
        if distributed.is_main():
            self.file = _open_after(run_dir / "metrics.jsonl", steps_done)
            self.validation_file = _open_after(run_dir / "validation.jsonl", steps_done)
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)

    def add(self, sums: StepSums) -> None:
        """Takes a step; every `log_freq` steps, and after the last one, writes what is pending."""
        self.pending.append(sums)
        if sums.step % self.log_freq == 0 or sums.step == self.max_steps:
            self.flush()

    def flush(self) -> None:
        """Adds the pending steps over the ranks, in one all-reduce, and writes them."""
        if not self.pending:
            return
        losses = torch.stack([sums.losses for sums in self.pending]).double()
        counts = losses.new_tensor([[sums.num_grounded_samples, sums.num_tokens] for sums in self.pending])
        totals = distributed.sum_over_ranks(torch.cat([losses, counts], dim=1)).tolist()
        ends = [sums.started_s for sums in self.pending[1:]] + [time.monotonic()]
        if self.file and self.writer:
            for sums, total, end_s in zip(self.pending, totals, ends, strict=True):
                record = self._record(sums, total, end_s)
                self.file.write(json.dumps(record | {"loss_hex": record["loss"].hex()}) + "\n")
            self.file.flush()
            for name, tag in TAGS.items():
                if record[name] is not None:
                    self.writer.add_scalar(tag, record[name], record["step"])
            print(_console_line(record, self.max_steps), flush=True)
        self.pending.clear()

    def add_validation(self, step: int, losses: dict[str, float]) -> None:
        """Writes a validation, which every rank has agreed on already."""
        if self.validation_file and self.writer:
            hexadecimal = {"loss_hex": losses["loss"].hex()}
            self.validation_file.write(json.dumps({"step": step} | losses | hexadecimal) + "\n")
            self.validation_file.flush()
            for name, value in losses.items():
                self.writer.add_scalar(f"validation/{name}", value, step)
            print(f"step {step:>5}/{self.max_steps} | validation loss {losses['loss']:.4f}", flush=True)

    def _record(self, sums: StepSums, total: list[float], end_s: float) -> dict[str, Any]:
        loss, ce_loss, latent_loss, grounded, tokens = total
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
            "samples_per_s": self.global_batch_size / step_s,
            "tokens_per_s": tokens / step_s,
            "step_s": step_s,
            "data_pct": 100 * sums.waited_s / step_s,
        }

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.flush()
        for file in (self.file, self.validation_file, self.writer):
            if file:
                file.close()


def _open_after(path: Path, step: int) -> TextIO:
    """Opens a file of records for appending, behind those of steps up to `step`; a line cut short by a kill goes."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    new = path.with_suffix(".new")
    new.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    new.replace(path)
    return path.open("a")


def _console_line(record: dict[str, Any], max_steps: int) -> str:
    skipped = record["skipped_steps"]
    return (
        f"step {record['step']:>5}/{max_steps} | loss {record['loss']:.4f} | text {record['ce_loss']:.4f} | "
        f"latent {record['latent_loss']:.4f} | lr {record['lr']:.2e} | grad norm {record['grad_norm']:.3f} | "
        f"{record['samples_per_s']:.1f} samples/s | {record['step_s']:.2f} s | data {record['data_pct']:.0f}%"
        + (f" | {skipped} steps skipped: gradient not finite" if skipped else "")
    )
