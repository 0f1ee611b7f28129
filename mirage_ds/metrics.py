"""What a run reports: metrics.jsonl with every step in full precision, and from it TensorBoard and the console line.

Losses stay on the device and are added over the ranks only when they are due, so that a step never waits for the host.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from mirage_ds import distributed

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

    `losses` are sums over this rank's samples: [loss, ce_loss, latent_loss, grounded samples, tokens].
    """

    step: int
    position: int
    losses: torch.Tensor
    lr: float
    grad_norm: torch.Tensor | float
    skipped_steps: int
    started_s: float
    waited_s: float


class Metrics:
    """Collects steps, and writes them when they are due. Every rank calls it; rank 0 writes."""

    def __init__(self, run_dir: Path, *, global_batch_size: int, max_steps: int, log_freq: int) -> None:
        self.global_batch_size, self.max_steps, self.log_freq = global_batch_size, max_steps, log_freq
        self.pending: list[StepSums] = []
        self.file = self.writer = None
        if distributed.is_main():
            self.file = (run_dir / "metrics.jsonl").open("a")
            self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def add(self, sums: StepSums) -> None:
        """Takes a step; every `log_freq` steps, and after the last one, writes what is pending."""
        self.pending.append(sums)
        if sums.step % self.log_freq == 0 or sums.step == self.max_steps:
            self.flush()

    def flush(self) -> None:
        """Adds the pending steps over the ranks, in one all-reduce, and writes them."""
        if not self.pending:
            return
        totals = distributed.sum_over_ranks(torch.stack([sums.losses.double() for sums in self.pending])).tolist()
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
        if self.file and self.writer:
            self.file.close()
            self.writer.close()


def _console_line(record: dict[str, Any], max_steps: int) -> str:
    skipped = record["skipped_steps"]
    return (
        f"step {record['step']:>5}/{max_steps} | loss {record['loss']:.4f} | text {record['ce_loss']:.4f} | "
        f"latent {record['latent_loss']:.4f} | lr {record['lr']:.2e} | grad norm {record['grad_norm']:.3f} | "
        f"{record['samples_per_s']:.1f} samples/s | {record['step_s']:.2f} s | data {record['data_pct']:.0f}%"
        + (f" | {skipped} steps skipped: gradient not finite" if skipped else "")
    )
