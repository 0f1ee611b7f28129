"""The configuration of a run: every key with its meaning, default and limits; `make docs` makes a page of it.

Every number has one owner. What DeepSpeed alone decides is set in `ds_configs/*.json`; everything else is set here.
"""

import math
from typing import Literal, cast

from pydantic import Field, model_validator

from mirage_ds.config_values import (
    MAX_SECONDS,
    NonNegativeInt,
    Pair,
    PositiveInt,
    PositiveIntOrAuto,
    Rate,
    Section,
    UserName,
    UserPath,
)
from mirage_ds.errors import ConfigError

Stage = Literal["text", "stage1", "stage2"]
CompressStrategy = Literal["average", "average_all", "grid"]
Dtype = Literal["bf16", "fp32"]
OnFault = Literal["stop", "skip"]
LatentEnd = Literal["fixed", "model"]
TaskName = Literal["vsp-spatial-planning", "vsp-spatial-reasoning"]


class RunConfig(Section):
    """Where the run writes, and what it starts from."""

    dir: UserPath
    """The run's folder: checkpoints, `metrics.jsonl`, TensorBoard files and the resolved configuration."""
    seed: NonNegativeInt = 42
    """Seed of the order of the samples, and of torch."""
    init_from: UserPath | None = None
    """Folder of another run, whose last checkpoint's weights replace those of `model.path` (stage 2 from stage 1)."""
    resume: Literal["never", "auto", "extend"] = "never"
    """`auto`: resume from the last complete checkpoint in `run.dir`, if there is one; `never`: `run.dir` must not
    hold a checkpoint; `extend`: as `auto`, but there must be a checkpoint, and `train.max_steps` or `train.epochs` may
    be larger than before."""
    save_before_end_s: int = Field(default=120, ge=0, le=MAX_SECONDS)
    """In a SLURM job, the run saves and ends this many seconds before the job's time limit, so that it can resume."""


class ModelConfig(Section):
    """Which model is trained, and how it is computed."""

    path: UserName
    """Hugging Face folder or hub id of a Qwen2.5-VL whose embeddings have rows for the latent tokens (else see
    `mirage init --from`)."""
    cache_dir: UserPath | None = None
    """Folder for downloads from the hub; unset: the Hugging Face default."""
    latent_size: PositiveInt = 4
    """K: latent tokens per helper image, for rows without a `latent_size` of their own."""
    compress_strategy: CompressStrategy = "average"
    """How a helper image's patch embeddings are pooled to K targets. `average`: means of K equal segments, the
    remainder dropped, as in the reference; `average_all`: means of K segments, no patch dropped; `grid`: means of the
    cells of a grid over the image, whose rows times columns are K."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernels. `auto`: `flash_attention_2` on a GPU in bf16 where flash-attn can be imported, else `sdpa`."""
    gather: Literal["auto", "layer", "rollout"] = "auto"
    """What ZeRO-3 gathers at a time. `layer`: one decoder layer; `rollout`: the complete decoder, once for all passes;
    `auto`: `rollout` in stage 2, else `layer`."""
    activation_checkpointing: Literal["full", "none"] = "full"
    """`full`: the activations of each decoder layer are recomputed in backward; `none`: they are stored."""
    train_tower: bool = False
    """Train the vision tower too; the method keeps it frozen."""
    cache_targets: UserPath | None = None
    """Stage 1: folder that keeps the latent targets of helper images, so that later epochs do not encode them again;
    see [training](training.md#keep-latent-targets). Unset: every epoch encodes them."""
    cache_targets_gib: float = Field(default=64, gt=0)
    """Largest size of the file in `model.cache_targets`; helper images beyond it are encoded in every epoch."""

    @model_validator(mode="after")
    def _cached_targets_stay_valid(self) -> "ModelConfig":
        if self.cache_targets is not None and self.train_tower:
            raise ValueError(
                "cache_targets keeps what the vision tower computes, which train_tower=true changes; only one of the "
                "two is possible; unset model.cache_targets or model.train_tower"
            )
        return self


class DataConfig(Section):
    """The training data, and the processes that read it."""

    shards: UserPath
    """Folder that `mirage-data build` wrote."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that read and encode; 0: the trainer's own process does."""
    min_pixels: PositiveInt | None = None
    """Smaller images are scaled up to this many pixels; unset: the limit in the model folder."""
    max_pixels: PositiveInt | None = None
    """Larger images are scaled down to this many pixels; unset: the limit in the model folder."""
    system_turn: bool = True
    """Begin with the chat template's default system turn ("You are a helpful assistant.")."""
    exif_orientation: bool = True
    """Turn images as their EXIF orientation says, as viewers do; `false`: take the pixels as they are stored, as the
    reference does. An exported model decodes as it was trained."""
    max_length: PositiveInt | None = None
    """Most tokens of a sample; a longer sample is an error that names it, and is never truncated. Unset: no limit."""
    on_fault: OnFault = "stop"
    """What a sample does that turns out to be unusable. `stop`: the run saves and ends with an error; `skip`: the next
    sample of the order takes its place too, with a warning, whatever the number of ranks and after every resume."""


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
            if self.global_batch_size is None or self.gradient_accumulation_steps is not None:
                raise ValueError(
                    "micro_batch_size_per_gpu is auto, which divides a global batch of a known size; set "
                    "train.global_batch_size, and leave train.gradient_accumulation_steps unset"
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


class CheckpointConfig(Section):
    """When and how checkpoints are saved, and how many are kept."""

    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    mode: Literal["background", "blocking"] = "background"
    """`background`: training waits only while the state is copied to host memory; a process of each rank writes it
    while the next steps are made. Needs host memory for one checkpoint, shared by the nodes; a run that finds too
    little says so and saves as `blocking`: training waits until all is written. The last checkpoint always blocks."""
    verify: Literal["none", "read_back"] = "none"
    """`none`: sha256 and size are taken from the bytes while they are written. `read_back`: each file is then also read
    from the disk and compared. A resume compares the sha256 of all files in any case."""
    keep_latest_k: PositiveInt = 2
    """Checkpoints to keep; older ones are deleted after a newer one is complete."""
    copy_to: UserPath | None = None
    """A second folder, for example on another file system, to which each checkpoint is copied in the background;
    unset: no copies."""

    @property
    def in_background(self) -> bool:
        """Whether a checkpoint is written while training continues: never the last one, for which the run waits."""
        return self.mode == "background" and self.interval > 0


class EvaluationConfig(Section):
    """Validation loss on samples that are not used for training."""

    shards: UserPath | None = None
    """Folder that `mirage-data build` wrote; unset: no validation."""
    interval: PositiveInt = 100
    """Steps between two validations; there is one more after the last step."""
    max_samples: PositiveInt = 256
    """Most samples of a validation, taken evenly from all of the folder."""


class DistributedConfig(Section):
    """DeepSpeed and the process group."""

    deepspeed_config: UserName = "zero3.json"
    """DeepSpeed's JSON: a path (with a `/`), or the name of a file in `ds_configs/`."""
    timeout_s: int = Field(default=1800, gt=0, le=MAX_SECONDS)
    """Seconds that a collective may wait before the run ends with an error. For each micro-batch of data a rank waits
    four fifths of them, so that the run can still save."""


class LaunchConfig(Section):
    """How a cluster job handles failures (`mirage-launch slurm`)."""

    max_restarts: NonNegativeInt = 3
    """How often a job that failed is restarted. Preemptions and time limits are not failures."""


class Config(Section):
    """The complete configuration of a run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _targets_are_used(self) -> "Config":
        if self.model.cache_targets is not None and self.train.stage != "stage1":
            raise ValueError(
                f"model.cache_targets is set, but {self.train.stage} has no latent targets; it is for "
                "train.stage=stage1; unset model.cache_targets"
            )
        # Not by model_fields_set: a resolved recipe has every key.
        default = ModelConfig.model_fields["cache_targets_gib"].default
        if self.model.cache_targets is None and self.model.cache_targets_gib != default:
            raise ValueError("model.cache_targets_gib limits model.cache_targets, which is unset; set both or neither")
        return self
