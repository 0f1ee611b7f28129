"""The training loop, over an engine and an iterator of batches. It knows nothing of files or formats."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from mirage_ds.batch import Batch
from mirage_ds.config import TrainConfig
from mirage_ds.data.steps import Step, Steps
from mirage_ds.errors import DataError, EvaluationError, StallError, TrainingError
from mirage_ds.train_state import TrainState
from mirage_ds.training import early_end
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.step_clock import StepClock
from mirage_ds.training.step_sums import StepSums
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import learning_rate


class Trainer:
    """Runs optimizer steps until `max_steps`."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        batches: Iterator[Batch],
        steps: Steps,
        train: TrainConfig,
        metrics: Metrics,
        state: TrainState,
        *,
        max_steps: int,
        device: torch.device,
        agree_on_passes: bool,
        early_end: EarlyEnd,
        save_progress: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            batches: this rank's micro-batches, endless.
            steps: which samples they are; a step has as many on every rank.
            agree_on_passes: all ranks make the same number of passes; needed where ZeRO-3 gathers inside them.
            early_end: called after each step; if it gives one rank a reason to end, all ranks end.
            save_progress: called after each step; the largest value of the ranks is then in `save_progress`.
        """
        self.engine, self.batches, self.steps, self.train_config = engine, batches, steps, train
        self.metrics, self.state, self.device = metrics, state, device
        self.max_steps = max_steps
        self.agree_on_passes = agree_on_passes
        self.early_end = early_end
        self.clock = StepClock()
        self.own_save_progress, self.save_progress = save_progress, 0
        self.world_size = distributed.world_size()
        self.global_batch_size = train.samples_per_step(self.world_size)
        self.skipped_in_row = 0
        self.dealt = Step([], 1.0)  # this rank's part of the next step
        self.ready: list[Batch] = []  # its micro-batches, on the host
        self.fault: DataError | EvaluationError | None = None  # why this rank has none, or must end
        self.any_fault = False  # on any rank

    def train(self, after_step: Sequence[Callable[[TrainState], None]] = ()) -> None:
        """The rest of the run; after each step, the actions of `after_step` in their order.

        Raises:
            TrainingError: on every rank: losses are not finite, rows have fewer columns than passes, or a sample cannot
                be used, or an evaluation cannot be made; the last two after the actions, which have saved.
            StallError: likewise: no data came.
        """
        self.fetch()
        self.agree_on_fault()
        while not self.any_fault and self.state.step < self.max_steps and not self.state.ends_early:
            self.early_end.begin_step()
            self.train_step()
            self.agree_on_end()
            for action in after_step:
                action(self.state)
        if self.any_fault:
            fault = next(fault for fault in distributed.gather(self.fault) if fault)
            where = f"after step {self.state.step}, which is saved" if self.state.step else "before its first step"
            if isinstance(fault, StallError):
                raise StallError(f"{fault}; the run ends {where}; start it again, with run.resume=auto")
            if isinstance(fault, EvaluationError):
                raise EvaluationError(
                    f"{fault}; the run ends {where}, and does not evaluate that step again; to do so, export it and "
                    f"use mirage evaluate{self.how_to_continue()}"
                )
            raise TrainingError(
                f"{fault}; the run ends {where}; continue with run.resume=auto once the cause is removed, or, if it is "
                "a single sample, with run.resume=auto data.on_fault=skip"
            )

    def how_to_continue(self) -> str:
        """After an evaluation that failed: nothing after the last step."""
        if self.state.step == self.max_steps:
            return ""
        return (
            "; continue with run.resume=auto, once the task or the rows are corrected, or with evaluation.task=null "
            "evaluation.rows=null"
        )

    def train_step(self) -> None:
        """One optimizer step over one global batch."""
        started_s = time.monotonic()
        self.clock.begin()
        self.metrics.begin(self.state.step + 1)
        lr = self.set_learning_rate()
        losses, num_grounded_samples, num_tokens, num_faults = torch.zeros(3, device=self.device), 0, 0, 0
        flops, num_cells, dealt = 0.0, 0, self.dealt
        done: list[tuple[Batch, torch.Tensor]] = []
        skipped_steps = self.engine.skipped_steps
        for micro_step, on_host in enumerate(self.ready):
            batch = on_host.to(self.device)
            own_losses = self.forward_backward(batch, last=micro_step == len(self.ready) - 1)
            done.append((batch, own_losses[0]))
            losses += own_losses
            num_grounded_samples += batch.num_grounded_samples
            num_tokens += batch.num_tokens
            num_cells += batch.num_cells
            flops += self.metrics.flops(batch)
            num_faults += self.report_faults(batch)
        with self.clock.device("optimizer"):
            self.engine.step()
        self.state.step += 1
        self.state.position += self.global_batch_size
        if self.state.step < self.max_steps:
            self.fetch()
        # DeepSpeed skips a step whose gradient is not finite, on all ranks, and only counts it.
        is_skipped = self.engine.skipped_steps > skipped_steps
        self.metrics.add(
            StepSums(
                step=self.state.step,
                position=self.state.position,
                losses=losses,
                num_grounded_samples=num_grounded_samples,
                num_tokens=num_tokens,
                num_cells=num_cells,
                imbalance=dealt.imbalance,
                lr=lr,
                grad_norm=self.engine.get_global_grad_norm(),
                skipped_steps=self.engine.skipped_steps,
                started_s=started_s,
                times=self.clock.end(),
                flops=flops,
                is_skipped=is_skipped,
                num_faults=num_faults,
            )
        )
        if is_skipped:
            self.report_skipped([describe(*each) for each in zip(dealt.micro_batches, done, strict=True)])
        else:
            self.skipped_in_row = 0

    def report_skipped(self, own: list[dict[str, Any]]) -> None:
        """Names the samples of a skipped step; ends the run if it was one too many.

        Args:
            own: this rank's micro-batches. Those of all ranks whose loss is not finite are named, or else all.

        Raises:
            TrainingError: on every rank.
        """
        batches = [batch for rank in distributed.gather(own) for batch in rank]
        bad_losses = [batch for batch in batches if not math.isfinite(batch["loss"])]
        step, allowed = self.state.step, self.train_config.max_skipped_steps
        path = self.metrics.add_bad_batches(step, bad_losses or batches)
        self.skipped_in_row += 1
        if step == 1 and bad_losses:
            self.metrics.flush()
            raise TrainingError(
                f"the run's first loss is not finite (step 1; the samples are in {path}); expected finite weights and "
                "samples; check the model that the run started from (model.path, run.init_from), then these samples"
            )
        if self.skipped_in_row >= allowed:
            self.metrics.flush()
            raise TrainingError(
                f"the loss or the gradient was not finite in {self.skipped_in_row} steps in a row (up to step {step}; "
                f"the samples are in {path}); train.max_skipped_steps={allowed} ends such a run, unsaved; check these "
                "samples and resume from the last checkpoint with run.resume=auto, or start a new run with a smaller "
                "train.lr"
            )

    def agree_on_end(self) -> None:
        """Whether the run ends here, before its last step: one rank with a reason is enough, as it alone may know.

        In the same all-reduce, how far the save under way is.
        """
        reason = self.early_end()
        own = [reason is not None, self.fault is not None, self.own_save_progress()]
        ends, faulty, self.save_progress = distributed.max_over_ranks(own, self.device)
        self.any_fault = bool(faulty)
        self.state.ends_early = bool(ends or faulty)
        if reason is not None:
            print(f"rank {distributed.rank()}: {reason}: saving and ending after step {self.state.step}", flush=True)
        if self.state.ends_early or self.state.step == self.max_steps:
            early_end.only_remember()  # what follows is the last save, which a signal to this rank must not end

    def agree_on_fault(self, fault: DataError | EvaluationError | None = None) -> bool:
        """Whether any rank has a sample that cannot be used, or a failed evaluation; then the run saves and ends."""
        self.fault = self.fault or fault
        self.any_fault = bool(distributed.max_over_ranks([self.fault is not None], self.device)[0])
        self.state.ends_early |= self.any_fault
        return self.any_fault

    def set_learning_rate(self) -> float:
        """Sets and returns the learning rate of the next step."""
        lr = learning_rate(self.state.step + 1, self.max_steps, self.train_config)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def fetch(self) -> None:
        """Takes the micro-batches of the next step.

        Before the step, and still on the host: a rank that has none must say so between two steps, where all can save.
        """
        with self.clock.host("data"):
            try:
                self.dealt = self.steps.at(self.state.position)
                self.ready = [next(self.batches) for _ in self.dealt.micro_batches]
            except DataError as error:
                self.fault = error

    def report_faults(self, batch: Batch) -> int:
        """Prints which samples could not be used; returns how many."""
        for fault in batch.faults:
            print(
                f"WARNING: rank {distributed.rank()}, step {self.state.step + 1}: {fault}; the next sample of the "
                "order takes its place (data.on_fault=skip)",
                flush=True,
            )
        return len(batch.faults)

    def forward_backward(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """Adds one micro-batch's gradient; returns [loss, ce_loss, latent_loss] of its rows.

        The gradient of a step is the mean over the global batch of each sample's own loss. ZeRO-3 averages over the
        ranks, so each rank's sum is scaled by world_size / global_batch_size.

        Args:
            last: of its step.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        with self.clock.device("forward"):
            losses = self.engine(batch=batch, num_passes=self.num_passes(batch))
        # An infinite loss may have a finite gradient. NaN makes DeepSpeed skip the step, without more communication.
        scale = torch.where(losses.loss.isfinite(), self.world_size / self.global_batch_size, torch.nan)
        with self.clock.device("backward"):
            self.engine.backward(losses.loss * scale, scale_wrt_gas=False)
        return torch.stack(losses).detach()

    def num_passes(self, batch: Batch) -> int | None:
        """Passes that every rank makes over its micro-batch; None: as many as its own latents need.

        Raises:
            TrainingError: on every rank, if one rank's rows have fewer columns than another rank makes passes.
        """
        if not self.agree_on_passes:
            return None
        columns = batch.input_ids.shape[1]
        own_passes = self.engine.module.rollout.num_passes(batch)
        passes, negative_columns = distributed.max_over_ranks([own_passes, -columns], self.device)
        if passes > -negative_columns:
            _, keys = min(distributed.gather((columns, batch.keys)))
            raise TrainingError(
                f"a micro-batch has {-negative_columns} columns, and one on another rank needs {passes} latent passes "
                f"({', '.join(keys)}); with model.gather=layer and groups every rank makes the same number of passes, "
                "at most as many as there are columns; leave out such short rows, use fewer latents (the rows' "
                "latent_size, or model.latent_size), or set model.gather=rollout, if the whole decoder fits on a GPU"
            )
        return passes


def describe(positions: list[int], done: tuple[Batch, torch.Tensor]) -> dict[str, Any]:
    """A micro-batch of this rank, for RUN/bad_batches.jsonl, with the mean of its samples' losses."""
    batch, loss = done
    mean = loss.item() / len(positions)
    return {"positions": positions, "rank": distributed.rank(), "keys": batch.keys, "loss": mean}
