"""The section `train` of a run's configuration: stage, length, batch, optimizer and losses."""

import math
from typing import Literal, cast

from pydantic import Field, model_validator

from mirage_ds.config_values import NonNegativeInt, Pair, PositiveInt, PositiveIntOrAuto, Rate, Section
from mirage_ds.errors import ConfigError

Stage = Literal["text", "stage1", "stage2"]
Dtype = Literal["bf16", "fp32"]


class TrainConfig(Section):
    """Stage, length, batch, optimizer and losses. Steps are optimizer steps."""

    stage: Stage
    """`text`: no latents, the baseline; `stage1`: latents are learned from helper images; `stage2`: the model's own
    hidden states are the latents."""
    max_steps: PositiveInt | None = None
    """Length of the run in steps. Set either this or `train.epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the data; the last step may reach into the next pass."""
    micro_batch_size_per_gpu: PositiveIntOrAuto = 1
    """Samples that a rank computes at a time. `auto`: the largest of 1, 2, 4, 8, ... that divides a rank's share of
    `train.global_batch_size`, which must be set, and fits into memory by the formulas of `mirage-launch plan`. The
    losses do not depend on it."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches of each rank per step; unset: as many as `train.global_batch_size` needs, or 1."""
    global_batch_size: PositiveInt | None = None
    """Samples per step over all ranks; unset: micro-batch size x accumulation steps x ranks."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the learning rate rises to `train.lr`; must be fewer than the steps of the run."""
    lr_decay: Literal["linear", "constant"] = "linear"
    """After the warm-up: `linear`: falls linearly towards 0 at the end of the run; `constant`: stays at `train.lr`."""
    warmup_from_zero: bool = False
    """`true`: the reference's schedule, whose first step has lr 0; `false`: the first step has lr / warmup_steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay; not applied to norms and biases."""
    betas: Pair[Rate] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, added to the root of the second moment."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    max_skipped_steps: PositiveInt = 3
    """A step whose loss or gradient is not finite changes no weight and is written to `RUN/bad_batches.jsonl`; so many
    in a row end the run. If the run's first loss is not finite, it ends at once."""
    dtype: Dtype = "bf16"
    """What the model computes in; master weights and optimizer states are always float32."""
    ce_loss_weight: float | None = Field(default=None, ge=0)
    """Weight of the text loss; unset: 0.1 in stage 1 as in the paper, 1 in stage 2 and text."""
    latent_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the latent loss (stage 1)."""
    log_freq: PositiveInt = 1
    """Steps between two lines on the console and two points in TensorBoard; `metrics.jsonl` has every step."""
    deterministic: bool = False
    """`true`: on GPUs, use only kernels that give the same bits every time (slower). Runs on CPUs always do."""
    profile_steps: Pair[PositiveInt] | None = None
    """First and last step that torch's profiler traces into `RUN/profile`, one file per rank; unset: no trace."""

    @model_validator(mode="after")
    def _length_is_set_once(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("the length of the run is set twice or not at all; set train.max_steps or train.epochs")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainConfig":
        """Checks what does not depend on the number of ranks; `samples_per_rank` checks the rest."""
        if self.micro_batch_size_per_gpu == "auto":
            if self.global_batch_size is None:
                raise ValueError(
                    "micro_batch_size_per_gpu is auto, which divides a global batch of a known size; set "
                    "train.global_batch_size"
                )
            if self.gradient_accumulation_steps is not None:
                raise ValueError(
                    f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but follows from "
                    "micro_batch_size_per_gpu, which is auto; set train.gradient_accumulation_steps=null"
                )
            return self
        share = self.micro_batch_size_per_gpu * (self.gradient_accumulation_steps or 1)
        if self.global_batch_size is not None and self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, not a multiple of the {share} samples of each rank "
                "(micro_batch_size_per_gpu x gradient_accumulation_steps); set train.global_batch_size to a "
                "multiple, or train.micro_batch_size_per_gpu to a divisor and leave "
                "train.gradient_accumulation_steps unset"
            )
        return self

    @model_validator(mode="after")
    def _profile_goes_forward(self) -> "TrainConfig":
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {self.profile_steps} end before they begin; write the smaller step first")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainConfig":
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, which is not below max_steps={self.max_steps}; "
                "set train.warmup_steps below train.max_steps"
            )
        return self

    @property
    def text_weight(self) -> float:
        """The effective weight of the text loss."""
        if self.ce_loss_weight is not None:
            return self.ce_loss_weight
        return 0.1 if self.stage == "stage1" else 1.0

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch, once `auto` has become a number (sizing/micro_batch.py)."""
        if self.micro_batch_size_per_gpu == "auto":
            raise ValueError("train.micro_batch_size_per_gpu is still auto: the run must choose a number first")
        return self.micro_batch_size_per_gpu

    def samples_per_rank(self, world_size: int) -> int:
        """Samples of each rank per optimizer step.

        Raises:
            ConfigError: `global_batch_size` is not possible with this many ranks.
        """
        if self.global_batch_size is None:
            return self.micro_batch_size * (self.gradient_accumulation_steps or 1)
        micro_step = world_size * (1 if self.micro_batch_size_per_gpu == "auto" else self.micro_batch_size_per_gpu)
        steps, rest = divmod(self.global_batch_size, micro_step)
        if rest or self.gradient_accumulation_steps not in (None, steps):
            wanted = self.gradient_accumulation_steps
            multiple = -(-self.global_batch_size // micro_step) * micro_step
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} does not divide over {world_size} "
                f"{'rank' if world_size == 1 else 'ranks'} with train.micro_batch_size_per_gpu="
                f"{self.micro_batch_size_per_gpu}"
                + (f" and train.gradient_accumulation_steps={wanted}" if wanted else "")
                + f"; allowed: multiples of {micro_step}"
                + (" with train.gradient_accumulation_steps unset" if wanted else "")
                + f"; set for example train.global_batch_size={multiple}"
                + (" train.gradient_accumulation_steps=null" if wanted else "")
                + ", or change the number of ranks"
            )
        return self.global_batch_size // world_size

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of each rank per optimizer step.

        Raises:
            ConfigError: as `samples_per_rank`.
        """
        return self.samples_per_rank(world_size) // self.micro_batch_size

    def samples_per_step(self, world_size: int) -> int:
        """G: samples per optimizer step, over all ranks."""
        return self.samples_per_rank(world_size) * world_size

    def num_steps(self, num_samples: int, world_size: int) -> int:
        """Optimizer steps of the run over a data set of `num_samples`.

        Raises:
            ConfigError: the run ends before its warm-up.
        """
        if self.epochs is None:
            return cast(int, self.max_steps)
        steps = math.ceil(self.epochs * num_samples / self.samples_per_step(world_size))
        if self.warmup_steps >= steps:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps}, but the run has {steps} in total (train.epochs="
                f"{self.epochs}, samples: {num_samples}); the warm-up must be shorter; set train.warmup_steps or "
                "train.epochs"
            )
        return steps
