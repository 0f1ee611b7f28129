"""Lengths and costs of all rows for a model. Loads torch: imported by the commands that need it, when they run."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_tools.model_options import ModelOptions
from mirage_ds.config import Stage
from mirage_ds.data.columns import IndexEntry
from mirage_ds.data.costs import TOKEN_PATCHES, Costs, SampleCosts
from mirage_ds.data.counts import counts_name, load_counts
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.index import load_index
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import DataError

STAGES: tuple[Stage, ...] = ("text", "stage1", "stage2")
Numbers = npt.NDArray[np.int64]  # [number of samples]


@dataclass(frozen=True)
class Lengths:
    """Of all rows of a folder, in the order of the index."""

    source: Literal["counted", "estimated from characters"]  # how the tokens of texts were found
    tokens: dict[Stage, Numbers]
    costs: dict[Stage, Numbers]  # in patches, of a row that is alone in its micro-batch
    input_patches: Numbers
    helper_patches: Numbers


def open_encoder(options: ModelOptions, stage: Stage = "stage1") -> Encoder:
    """The model's encoder.

    Raises:
        ConfigError: the model's folder lacks something that encoding needs.
    """
    return load_encoder(
        options.model,
        stage=stage,
        latent_size=options.latent_size,
        system_turn=options.system_turn,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        cache_dir=options.cache_dir,
    )


def measure_lengths(folder: ShardFolder, options: ModelOptions) -> Lengths:
    """From the index and, if there are some, the counts that `mirage-data count` wrote; no tar is read.

    Raises:
        MirageError: the model, the index or the counts cannot be read.
    """
    encoder, index = open_encoder(options), load_index(folder)
    name = counts_name(encoder.tokenizer, system_turn=options.system_turn)
    counts = {stage: load_counts(name, folder, stage=stage) for stage in STAGES}

    def measure(stage: Stage) -> Costs:
        return SampleCosts(index, encoder.image_tokens, stage, options.latent_size, texts=counts[stage]).all()

    costs = {stage: measure(stage) for stage in STAGES}
    patches = {stage: each.costs - TOKEN_PATCHES * each.tokens for stage, each in costs.items()}
    return Lengths(
        source="counted" if counts["text"] is not None else "estimated from characters",
        tokens={stage: each.tokens for stage, each in costs.items()},
        costs={stage: each.in_rows(1) for stage, each in costs.items()},
        input_patches=patches["text"],
        helper_patches=patches["stage1"] - patches["text"],
    )


def counted_tokens(folder: ShardFolder, options: ModelOptions) -> dict[Stage, Numbers]:
    """The exact tokens of all rows in each stage.

    Raises:
        DataError: they were not counted for this model.
    """
    lengths = measure_lengths(folder, options)
    if lengths.source != "counted":
        raise DataError(
            f"the tokens were not counted for this model ({folder.place}, --model {options.model}); rows are chosen by "
            f"exact numbers of tokens; run `mirage-data count {folder.place} --model {options.model}` first"
        )
    return lengths.tokens


@dataclass(frozen=True)
class RowTokens:
    """The exact tokens of one row in stages 1 and 2."""

    total: int
    images: int  # of them, those of the input images
    latents: int  # of them, those of the latent blocks, without markers

    @property
    def text(self) -> int:
        """With the template and all markers."""
        return self.total - self.images - self.latents


def row_tokens(encoder: Encoder, sample: Sample, entry: IndexEntry, latent_size: int) -> RowTokens:
    """Counted as the encoder does it; no image is decoded."""
    total = encoder.count_tokens(sample, entry.input_sizes)
    return RowTokens(total, int(encoder.image_tokens(entry.input_sizes).sum()), sum(entry.block_sizes(latent_size)))
