"""The section `data` of a configuration."""

from typing import Literal

from pydantic import Field, model_validator

from mirage_ds.config_values import (
    MAX_SECONDS,
    NonNegativeInt,
    PositiveInt,
    Section,
    ShardPaths,
    UserPath,
    WeightedShards,
)

OnFault = Literal["stop", "skip"]
HelperImages = Literal[True, "gray", "input", "shuffled", "none"]


class DataConfig(Section):
    """The training data, and the processes that read it."""

    shards: ShardPaths
    """Folder that `mirage-data build` wrote, or its [URL](data.md#shards-on-a-server); or a list of such folders, each
    by itself or as `{path: FOLDER, weight: W}`: an epoch then has W passes over this one (1 by default; 0.5: the next
    half each time), evenly mixed; see [data](data.md#several-data-sets)."""
    shuffle: Literal["full", "window"] = "full"
    """`full`: all samples of an epoch are shuffled together; `window`: shards are shuffled, and samples inside windows
    of `data.shuffle_window` shards, so that a network disk is read mostly in sequence. With either a run resumes
    exactly, at any position and on any number of ranks; see [data](data.md#the-order-of-samples)."""
    shuffle_window: PositiveInt = 16
    """Shards of a window, with `data.shuffle: window`. More mix better; of fewer, more stays in a cache."""
    cache_dir: UserPath | None = None
    """Folder on a disk of each node that keeps what was read from the URLs of shards, for all runs there; unset:
    `mirage_ds-cache-UID` in TMPDIR. Not used for shards on a disk."""
    cache_gib: float = Field(default=64, gt=0)
    """Largest size of `data.cache_dir`; what was not used for the longest time is removed."""
    read_timeout_s: float = Field(default=60, gt=0, le=MAX_SECONDS)
    """Seconds that one read from a URL may take; it is tried six times, with longer and longer waits, half a minute in
    all, before `data.on_fault` decides."""
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
    balance: bool = True
    """Deal the samples of each global batch by their cost: where a global batch has enough samples, the ranks are level
    in every micro-step, and rows of a micro-batch are alike. `false`: in order; not with packed rows. The losses are
    the same; see [training](training.md#who-computes-which-sample)."""
    packing: bool = False
    """Text and stage 1: samples share one row without padding, as many as fit into `data.token_budget`, and do not see
    each other; the losses stay the same. A micro-batch is one such row, `train.micro_batch_size_per_gpu` then only
    counts for the size of the global batch. Needs the counts of `mirage-data count`; see
    [training](training.md#packed-rows)."""
    text_dropout_image: float = Field(default=0.0, ge=0, le=1)
    """Share of the training rows, drawn by `run.seed` and the row's place in the order, whose images are hidden after
    their first latent block as with `model.answer_sees_image: false`. Not in validation and decoding.
    Above 0, rows with an image after their first block are refused."""
    token_budget: PositiveInt | None = None
    """Most tokens of a packed row; a sample that is longer is refused before the run."""
    helper: HelperImages = True
    """What the helper images of the samples are, to train the arms of a comparison from the same shards. `true`: the
    row's own; `gray`: a gray image of the same size; `input`: the row's input image; `shuffled`: the helper images of
    another row; `none`: the row has no helper image, and its answer no latents. Stage 2 and text read no helper image,
    so that there only `none` changes something; see [training](training.md#control-arms)."""
    on_fault: OnFault = "stop"
    """What a sample does that turns out to be unusable. `stop`: the run saves and ends with an error; `skip`: the next
    sample of the order takes its place too, with a warning, whatever the number of ranks and after every resume."""

    @property
    def sets(self) -> tuple[WeightedShards, ...]:
        """The folders of `shards` with their weights."""
        return self.shards if isinstance(self.shards, tuple) else (WeightedShards(path=self.shards),)

    @model_validator(mode="after")
    def _windows_are_used(self) -> "DataConfig":
        default = DataConfig.model_fields["shuffle_window"].default
        if self.shuffle == "full" and self.shuffle_window != default:
            raise ValueError(
                f"shuffle_window is {self.shuffle_window}, but all samples are shuffled together (data.shuffle=full); "
                f"windows are for data.shuffle=window; set that, or data.shuffle_window={default}"
            )
        return self

    @model_validator(mode="after")
    def _packing_has_a_budget(self) -> "DataConfig":
        if self.packing and self.token_budget is None:
            raise ValueError(
                "packing is true, but data.token_budget is unset; a packed row needs a limit, at least the longest "
                "sample; set data.token_budget to the tokens that fit into memory at a time, or data.packing=false"
            )
        if self.token_budget is None:
            return self
        if not self.packing:
            raise ValueError(
                f"token_budget is {self.token_budget}, but rows are not packed (data.packing=false); a budget is for "
                "packed rows only; set data.packing=true, or data.token_budget=null"
            )
        if not self.balance:
            raise ValueError(
                "balance is false, but rows are packed (data.packing=true), which fills them by cost and not in order; "
                "only one of the two is possible; set data.balance=true, or data.packing=false data.token_budget=null"
            )
        if self.max_length is not None and self.token_budget < self.max_length:
            raise ValueError(
                f"token_budget is {self.token_budget}, below max_length={self.max_length}; a packed row must have room "
                "for the longest sample; raise data.token_budget, or lower data.max_length"
            )
        return self
