"""What rank 0 writes of the run: metrics.jsonl with every step in full precision, TensorBoard, the console's lines."""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirage_ds.config import Stage
from mirage_ds.training.curves import Curves, Look
from mirage_ds.training.goodput import Goodput
from mirage_ds.training.latent_sums import LatentFigures
from mirage_ds.training.planned import Planned
from mirage_ds.training.records import Records
from mirage_ds.training.slow_rank import Slowest, Window
from mirage_ds.training.step_sums import RankFigures, StepSums, Totals

# metrics.jsonl has all losses in every stage. Only stage 1 has a latent loss, and so a total that is not the text loss
# alone. The text loss comes first: it compares between stages.
CONSOLE_LOSSES: dict[Stage, dict[str, str]] = {
    "text": {"ce_loss": "text"},
    "stage1": {"ce_loss": "text", "latent_loss": "latent", "loss": "loss"},
    "stage2": {"ce_loss": "text"},
}
BAD_BATCHES_NAME = "bad_batches.jsonl"
RECENT_STEPS = 50  # from which the remaining time is estimated
ALIKE_IN_ROW = 20  # shown steps in which rows' latents are alike, until the log says so: a run may begin like that
GIB = 2**30
TAGS = {
    "loss": "train/loss",
    "ce_loss": "train/ce_loss",
    "latent_loss": "train/latent_loss",
    "cosine": "train/cosine",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "samples_per_s": "throughput/samples_per_s",
    "imbalance": "data/imbalance",
    "padding_pct": "data/padding_pct",
    "tokens_per_s": "throughput/tokens_per_s",
    "tokens_per_s_per_gpu": "throughput/tokens_per_s_per_gpu",
    "mfu_pct": "throughput/mfu_pct",
    "goodput_pct": "throughput/goodput_pct",
    "step_s": "time/step_s",
    "data_pct": "time/data_pct",
    "data_s": "time/data_s",
    "tower_s": "time/tower_s",
    "forward_s": "time/forward_s",
    "backward_s": "time/backward_s",
    "optimizer_s": "time/optimizer_s",
    "save_s": "time/save_s",
    "slowest_pct": "time/slowest_rank_pct",
    "max_allocated_gib": "memory/max_allocated_gib",
    "max_reserved_gib": "memory/max_reserved_gib",
    "planned_gib": "memory/planned_gib",
}


@dataclass
class Step:
    """A step that is to be written."""

    sums: StepSums
    totals: Totals
    end_s: float  # on the monotonic clock: when it ended

    @property
    def seconds(self) -> float:
        return self.end_s - self.sums.started_s


@dataclass(frozen=True)
class Evaluated:
    """What is reported of an evaluation in training."""

    shares: dict[str, float]  # such as the success; from 0 to 1
    latents: dict[str, float]  # how far those of different rows differ
    looks: list[Look]
    warning: str | None  # if they hardly do
    cautions: Sequence[str] = ()  # what makes the shares say less than they seem to, a line each


class Report:
    """The files of a run that grow with its steps."""

    def __init__(
        self,
        run_dir: Path,
        stage: Stage,
        global_batch_size: int,
        max_steps: int,
        steps_done: int,
        planned: Planned | None,
        hosts: list[str],
        set_names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            steps_done, planned: see Metrics.
            hosts: of each rank.
            set_names: of the data sets, where there are several.
        """
        self.set_names = set_names
        self.stage, self.global_batch_size, self.planned = stage, global_batch_size, planned
        self.max_steps, self.steps_done, self.num_ranks = max_steps, steps_done, len(hosts)
        self.recent_step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.steps = Records(run_dir / "metrics.jsonl", steps_done)
        self.validation = Records(run_dir / "validation.jsonl", steps_done)
        self.evaluation = Records(run_dir / "evaluation.jsonl", steps_done)
        self.bad_batches = Records(run_dir / BAD_BATCHES_NAME, steps_done)
        self.curves = Curves(run_dir / "tensorboard", steps_done)
        self.goodput = Goodput(run_dir, self.steps.last)
        self.window = Window(hosts)
        self.warned_of_latents, self.alike_in_row = False, 0

    def write(self, steps: list[Step], ranks: list[RankFigures], latents: LatentFigures | None = None) -> None:
        """Writes all of them to metrics.jsonl, and the last one as curves and on the console too.

        Args:
            latents: of the last one.
        """
        slowest = self.find_slowest(steps, ranks)
        records = [self.record(step) | describe_memory(ranks, self.planned) | describe_slowest(None) for step in steps]
        shown = records[-1] = records[-1] | describe_slowest(slowest)
        if latents:
            shown["latents"] = asdict(latents)
        # Seldom is the last one the step after a save, so its curve has what all of these waited for saves.
        points = shown | {"save_s": sum(record["save_s"] for record in records)}
        self.steps.add(*(record | {"loss_hex": record["loss"].hex()} for record in records))
        self.curves.add(
            {tag: points[name] for name, tag in TAGS.items() if self.has(name) and points[name] is not None}
            | self.set_curves(steps)
            | {f"latents/{name}": value for name, value in (latents.curves() if latents else {}).items()},
            points["step"],
        )
        self.recent_step_s.extend(step.seconds for step in steps if step.sums.step > self.steps_done + 1)
        print(self.console_line(shown), flush=True)
        if slowest and slowest.is_slow:
            print(f"step {shown['step']:>5}/{self.max_steps} | {slowest.describe()}", flush=True)
        if latents:
            warning = latents.warning()
            self.alike_in_row = self.alike_in_row + 1 if warning else 0
            if warning and self.alike_in_row == ALIKE_IN_ROW:
                self.warn_of_latents(shown["step"], warning)

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        hexadecimal = {"loss_hex": losses["loss"].hex()}
        self.validation.add({"step": step} | losses | hexadecimal)
        self.curves.add({f"validation/{name}": value for name, value in losses.items() if self.has(name)}, step)
        print(f"step {step:>5}/{self.max_steps} | validation {self.losses(losses)}", flush=True)

    def write_evaluation(self, step: int, evaluated: Evaluated, seconds: float) -> None:
        figures = evaluated.shares | evaluated.latents
        self.evaluation.add({"step": step} | figures | {"seconds": seconds})
        curves = {f"evaluation/{name}": value for name, value in figures.items()}
        self.curves.add(curves | {"time/evaluation_s": seconds}, step)
        self.curves.add_looks(evaluated.looks, step)
        shown = ("success", "cut_off", "with_blocks")  # and the success of the other arms
        parts = [
            f"{name.replace('_', ' ')} {value:.1%}"
            for name, value in evaluated.shares.items()
            if name in shown or name.startswith("success_")
        ]
        parts += [f"{name.replace('_', ' ')} {value:.2f}" for name, value in evaluated.latents.items()]
        print(f"step {step:>5}/{self.max_steps} | evaluation {' | '.join(parts)} | {duration(seconds)}", flush=True)
        for caution in evaluated.cautions:
            print(f"step {step:>5}/{self.max_steps} | {caution}", flush=True)
        if evaluated.warning:
            self.warn_of_latents(step, evaluated.warning)

    def warn_of_latents(self, step: int, warning: str) -> None:
        """Says once in a start that rows' latents are alike."""
        if not self.warned_of_latents:
            self.warned_of_latents = True
            print(f"step {step:>5}/{self.max_steps} | {warning}", flush=True)

    def write_bad_batches(self, step: int, batches: list[dict[str, Any]]) -> None:
        self.bad_batches.add(*({"step": step} | batch for batch in batches))
        keys = ", ".join(key for batch in batches for key in batch["keys"])
        print(f"step {step:>5}/{self.max_steps} | skipped: loss or gradient not finite ({keys:.200})", flush=True)

    def record(self, step: Step) -> dict[str, Any]:
        """A step's record; docs/training.md explains the names."""
        sums, totals, step_s = step.sums, step.totals, step.seconds
        seconds = {f"{part}_s": total / self.num_ranks for part, total in totals.seconds.items()}
        peak = self.planned.peak_flops if self.planned else None
        goodput = self.goodput.add(step_s, ago_s=time.monotonic() - step.end_s, skipped=sums.is_skipped)
        return {
            "step": sums.step,
            "position": sums.position,
            "loss": totals.loss / self.global_batch_size,
            "ce_loss": totals.ce_loss / self.global_batch_size,
            "latent_loss": totals.latent_loss / self.global_batch_size,
            "cosine": 1 - totals.latent_loss / totals.grounded_samples if totals.grounded_samples else None,
            **({"sets": self.set_losses([step])} if self.set_names else {}),
            "lr": sums.lr,
            "grad_norm": float(sums.grad_norm),
            "skipped_steps": sums.skipped_steps,
            "replaced_samples": int(totals.faults),
            "imbalance": sums.imbalance,
            "padding_pct": 100 * (1 - totals.tokens / totals.cells),
            "samples_per_s": self.global_batch_size / step_s,
            "tokens_per_s": totals.tokens / step_s,
            "tokens_per_s_per_gpu": totals.tokens / step_s / self.num_ranks,
            "flops": totals.flops if self.planned else None,
            "mfu_pct": 100 * totals.flops / (step_s * self.num_ranks * peak) if peak else None,
            "goodput_pct": 100 * goodput,
            "counted_s": self.goodput.counted_s,
            "first_start": self.goodput.first_start,
            "step_s": step_s,
            "data_pct": 100 * seconds["data_s"] / step_s,
            **seconds,
        }

    def set_losses(self, steps: list[Step]) -> dict[str, dict[str, float | None]]:
        """By set: the means of its samples in these steps, None where there are none, and their number."""
        found: dict[str, dict[str, float | None]] = {}
        for number, name in enumerate(self.set_names):
            text, latent, samples = map(sum, zip(*(step.totals.sets[number] for step in steps), strict=True))
            means = (text / samples, latent / samples) if samples else (None, None)
            found[name] = {"ce_loss": means[0], "latent_loss": means[1], "samples": int(samples)}
        return found

    def set_curves(self, steps: list[Step]) -> dict[str, float]:
        """The losses of each set by tag, over all of these steps: one step may have few samples of a set, or none."""
        return {
            f"train_sets/{loss}/{name}": value
            for name, figures in self.set_losses(steps).items()
            for loss, value in figures.items()
            if loss != "samples" and value is not None and self.has(loss)
        }

    def find_slowest(self, steps: list[Step], ranks: list[RankFigures]) -> Slowest | None:
        """At the end of a window, its slowest rank; the first step of a start is in no window."""
        counted = [step.seconds for step in steps if step.sums.step > self.steps_done + 1]
        return self.window.add([rank.own_s for rank in ranks], sum(counted), len(counted))

    def has(self, name: str) -> bool:
        """Whether the stage has this loss; a constant 0 is no curve."""
        return name != "latent_loss" or self.stage == "stage1"

    def losses(self, record: dict[str, Any]) -> str:
        return " | ".join(f"{word} {record[name]:.4f}" for name, word in CONSOLE_LOSSES[self.stage].items())

    def console_line(self, record: dict[str, Any]) -> str:
        parts = [
            f"step {record['step']:>5}/{self.max_steps}",
            self.losses(record),
            f"lr {record['lr']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['samples_per_s']:.1f} samples/s",
            f"{record['step_s']:.2f} s",
            f"data {record['data_pct']:.0f}%",
        ]
        if record["mfu_pct"] is not None:
            parts.append(f"MFU {record['mfu_pct']:.1f}%")
        if record["max_allocated_gib"] is not None:
            parts.append(f"{record['max_allocated_gib']:.1f} GiB (planned {record['planned_gib']:.1f})")
        if self.steps_done:  # before its first interruption, a run has only its start to lose
            parts.append(f"goodput {record['goodput_pct']:.0f}%")
        steps_left = self.max_steps - record["step"]
        if steps_left and self.recent_step_s:
            # Steps alone: validations and checkpoints take their time on top.
            parts.append(f"{duration(steps_left * statistics.median(self.recent_step_s))} left")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} steps skipped: gradient not finite")
        return " | ".join(parts)

    def close(self) -> None:
        for file in (self.steps, self.validation, self.evaluation, self.bad_batches, self.curves):
            file.close()


def describe_memory(ranks: list[RankFigures], planned: Planned | None) -> dict[str, float | None]:
    """The most that any rank has taken, in GiB, and what was planned; None on CPUs."""
    if planned is None or planned.peak_bytes is None:
        return dict.fromkeys(("max_allocated_gib", "max_reserved_gib", "planned_gib"))
    return {
        "max_allocated_gib": max(rank.allocated_bytes for rank in ranks) / GIB,
        "max_reserved_gib": max(rank.reserved_bytes for rank in ranks) / GIB,
        "planned_gib": planned.peak_bytes / GIB,
    }


def describe_slowest(slowest: Slowest | None) -> dict[str, Any]:
    """The slowest rank of a window, and how much slower than the median of the others it is; None but at its end."""
    if slowest is None:
        return dict.fromkeys(("slowest_rank", "slowest_host", "slowest_pct"))
    return {"slowest_rank": slowest.rank, "slowest_host": slowest.host, "slowest_pct": slowest.slower_pct}


def duration(seconds: float) -> str:
    """9.4 -> 9s; 65 -> 1m 05s; 3723 -> 1h 02m."""
    total = round(seconds)
    hours, minutes = total // 3600, total // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {total % 60:02}s" if minutes else f"{total}s"
