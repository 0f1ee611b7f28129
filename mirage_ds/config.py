"""The configuration of a run: every key with its meaning, default and limits; `make docs` makes a page of it.

Every number has one owner. What DeepSpeed alone decides is set in `ds_configs/*.json`; everything else is set here.
"""

from typing import Literal

from pydantic import Field, model_validator

from mirage_ds.config_data import DataConfig as DataConfig
from mirage_ds.config_data import HelperImages as HelperImages
from mirage_ds.config_data import OnFault as OnFault
from mirage_ds.config_lora import Lora
from mirage_ds.config_train import Dtype as Dtype
from mirage_ds.config_train import Stage as Stage
from mirage_ds.config_train import TrainConfig
from mirage_ds.config_values import (
    MAX_SECONDS,
    Listed,
    NonNegativeInt,
    PositiveInt,
    Section,
    UserLocation,
    UserName,
    UserPath,
)
from mirage_ds.errors import ConfigError

CompressStrategy = Literal["average", "average_all", "grid"]
LatentEnd = Literal["fixed", "model"]


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
    gather: Literal["auto", "layer", "groups", "rollout"] = "auto"
    """What ZeRO-3 gathers at a time. `layer`: one decoder layer; `groups`: `model.gather_layers` decoder layers, again
    in each pass, for models whose decoder does not fit on a GPU; `rollout`: the complete decoder, once for all passes;
    `auto`: `rollout` where the decoder takes several passes, in stage 2 and where images are hidden, else `layer`."""
    gather_layers: PositiveInt = 4
    """With `model.gather=groups`: layers of a group. Two groups are there at a time."""
    activation_checkpointing: Literal["full", "none"] = "full"
    """`full`: the activations of each decoder layer are recomputed in backward; `none`: they are stored."""
    answer_sees_image: bool = True
    """`false`: after a row's first latent block nothing attends to its input images any more, in training and in
    decoding, so that what the answer needs of them must be in the latents; see
    [training](training.md#make-the-latents-necessary). Rows without a block see their images; rows with an image after
    their first block are refused."""
    train_tower: bool = False
    """Train the vision tower too; the method keeps it frozen."""
    train_merger: bool = False
    """Train the merger, the tower's last part, and not its blocks."""
    freeze: Listed[str] = ()
    """Weights that are not trained besides: patterns such as `model.language_model.layers.[0-9].*`, by transformers'
    names of parameters; each must match some. With a tied head, the embedding's name stands for both."""
    lora: Lora | None = None
    """Train small matrices beside the model's own, which stay as they are; see [LoRA](lora.md). Unset: the decoder
    itself is trained."""
    cache_targets: UserPath | None = None
    """Stage 1: folder that keeps the latent targets of helper images, so that later epochs do not encode them again;
    see [training](training.md#keep-latent-targets). Unset: every epoch encodes them."""
    cache_targets_gib: float = Field(default=64, gt=0)
    """Largest size of the run's files in `model.cache_targets`; helper images beyond it are encoded in every epoch."""

    @model_validator(mode="after")
    def _cached_targets_stay_valid(self) -> "ModelConfig":
        if self.cache_targets is not None and self.trains_vision:
            key = "train_tower" if self.train_tower else "train_merger"
            raise ValueError(
                f"cache_targets keeps what the vision tower computes, which {key}=true changes; only one of the two is "
                f"possible; unset model.cache_targets or model.{key}"
            )
        return self

    @model_validator(mode="after")
    def _lora_decides_what_is_trained(self) -> "ModelConfig":
        others = {"train_tower": self.train_tower, "train_merger": self.train_merger, "freeze": self.freeze}
        for key in (key for key, value in others.items() if value and self.lora is not None):
            raise ValueError(
                f"lora trains its own matrices and the rows of lora.train_embeddings alone, but {key} is set too; only "
                f"one of the two is possible; unset model.{key} or model.lora"
            )
        return self

    @property
    def trains_vision(self) -> bool:
        """Whether some of the vision tower is trained."""
        return self.train_tower or self.train_merger


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
    """Validation loss, and answers to questions, on samples that are not used for training."""

    shards: UserLocation | None = None
    """Folder that `mirage-data build` wrote, or its URL; unset: no validation."""
    interval: PositiveInt = 100
    """Steps between two validations or evaluations; there is one more after the last step."""
    max_samples: PositiveInt = 256
    """Most samples of a validation, taken evenly from all of the folder."""
    task: str | None = None
    """How answers are scored, as `mirage evaluate --task`; `none`: answers only; unset: no questions are answered."""
    rows: UserPath | None = None
    """The questions: JSONL rows, or a folder that `mirage-data build` wrote."""
    max_rows: PositiveInt = 64
    """Most questions of an evaluation, taken evenly from all rows."""
    latents: str = "own"
    """What is fed at the latents: a list of arms, as `mirage evaluate --latents`; each decodes all questions."""
    max_new_tokens: PositiveInt = 1024
    """Limit of an answer, latents included."""
    batch_size: PositiveInt = 8
    """Questions that a rank decodes together."""

    @model_validator(mode="after")
    def _task_and_rows(self) -> "EvaluationConfig":
        if (self.task is None) != (self.rows is None):
            raise ValueError(
                "evaluation.task and evaluation.rows belong together, and one of them is unset; set both or neither"
            )
        return self


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
        if self.model.cache_targets is not None and self.data.helper == "none":
            raise ValueError(
                "model.cache_targets is set, but with data.helper=none there is no latent target; allowed with any "
                "other data.helper; unset one of the two"
            )
        # Not by model_fields_set: a resolved recipe has every key.
        default = ModelConfig.model_fields["cache_targets_gib"].default
        if self.model.cache_targets is None and self.model.cache_targets_gib != default:
            raise ValueError("model.cache_targets_gib limits model.cache_targets, which is unset; set both or neither")
        return self

    @model_validator(mode="after")
    def _groups_are_for_several_passes(self) -> "Config":
        if self.model.gather == "groups" and not self.several_passes:
            raise ValueError(
                f"model.gather=groups is for several passes over the decoder, {self.train.stage} takes one; allowed "
                "in stage2, and where images are hidden; set model.gather=layer"
            )
        return self

    @model_validator(mode="after")
    def _packed_rows_take_one_pass(self) -> "Config":
        if self.data.packing and self.train.stage == "stage2":
            raise ValueError(
                "data.packing is true, but stage2 feeds latents back column by column, which packed samples do not "
                "share; allowed in text and stage1; set data.packing=false: stage2 groups rows by length instead, with "
                "data.balance"
            )
        return self

    @model_validator(mode="after")
    def _images_can_be_hidden(self) -> "Config":
        share = self.data.text_dropout_image
        if not self.hides_images:
            return self
        setting = f"data.text_dropout_image is {share}" if share else "model.answer_sees_image is false"
        default = "data.text_dropout_image=0" if share else "model.answer_sees_image=true"
        if share and not self.model.answer_sees_image:
            raise ValueError(
                f"{setting}, but model.answer_sees_image=false hides the images of all rows already; one of the two is "
                "enough; set data.text_dropout_image=0, or model.answer_sees_image=true"
            )
        if self.train.stage == "text" or self.data.helper == "none":
            without = "stage text" if self.train.stage == "text" else "data.helper=none"
            raise ValueError(
                f"{setting}, which hides the images after a row's first latent block, and {without} has no blocks; "
                f"allowed in stage1 and stage2, with any other data.helper; set {default}"
            )
        if self.data.packing:
            raise ValueError(
                f"{setting}, but rows are packed (data.packing=true), whose samples would each hide other columns from "
                "another one on; only one of the two is possible; set data.packing=false data.token_budget=null, or "
                f"{default}"
            )
        return self

    @property
    def hides_images(self) -> bool:
        """Whether nothing attends to the images of some rows after their first latent block."""
        return not self.model.answer_sees_image or self.data.text_dropout_image > 0

    @property
    def controls(self) -> dict[str, str | float]:
        """What makes the run an arm of a comparison, by key; nothing of what is as by default."""
        found: dict[str, str | float] = {}
        if self.data.helper is not True:
            found["data.helper"] = self.data.helper
        if not self.model.answer_sees_image:
            found["model.answer_sees_image"] = "false"
        if self.data.text_dropout_image:
            found["data.text_dropout_image"] = self.data.text_dropout_image
        return found

    @property
    def several_passes(self) -> bool:
        """Whether the decoder may take several passes over a micro-batch: see model/rollout.py."""
        return self.train.stage == "stage2" or self.hides_images

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows that a rank computes at a time: one where samples are packed."""
        return 1 if self.data.packing else self.train.micro_batch_size

    def check_packing(self, world_size: int) -> None:
        """Rows are packed only where a rank has several samples per step.

        Raises:
            ConfigError: it has one, or `global_batch_size` is not possible with this many ranks.
        """
        if self.data.packing and self.train.samples_per_rank(world_size) == 1:
            raise ConfigError(
                f"data.packing has nothing to pack: a rank has 1 sample per step (a global batch of {world_size} on "
                f"{world_size} {'rank' if world_size == 1 else 'ranks'}); allowed: 2 or more; raise "
                "train.global_batch_size or train.gradient_accumulation_steps, or set data.packing=false "
                "data.token_budget=null"
            )
