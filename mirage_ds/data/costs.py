"""The size of rows of a folder of shards, from its index: no sample is read. What the deal levels by.
Needs no torch.

It is computed for the samples of a global batch at a time, from the mapped index, so that no process holds what
millions of samples cost.

Image tokens and latents are exact: the index has the size of every image, from which the processor's rule gives the
patches. Text is estimated from its number of characters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirage_ds.config import Stage
from mirage_ds.data.columns import Entries, Index, parts_of
from mirage_ds.data.ragged import Numbers, sums
from mirage_ds.patch_grid import CELL_PATCHES

CHARS_PER_TOKEN = 3  # a cautious assumption: English prose has about 4, numbers and markup fewer
TEMPLATE_TOKENS = 30  # of the chat template: a system turn, start and end of two turns
MARKERS = 2  # around each image and each latent block
TOKEN_PATCHES = 25
"""Patches that cost as much as a token. By elements of matrices: a token goes through 2.8 (3B) to 6.5 (7B) G of them in
forward, recomputation and twice in backward, a patch of the frozen tower through 0.63 G in forward: 18 to 41."""
# What a pass costs beside its tokens, in tokens. A pass reads all weights about three times (forward, forward again and
# backward). At 2 bytes per weight and 3.3 TB/s this takes as long as 8 FLOPs per weight and token take for about 90
# tokens at 400 TFLOP/s, whatever the number of weights. Estimated from an H100's rates, not measured.
PASS_TOKENS = 96

ImageTokens = Callable[[npt.ArrayLike], Numbers]
"""Tokens [N] of images of these sizes (width, height) [N, 2]: `ImageProcessor.image_tokens`."""


@dataclass(frozen=True)
class RowSizes:
    """The sizes of n rows in a stage; arrays [n]."""

    question: Numbers  # tokens, with the chat template, images and their markers
    answer: Numbers  # tokens of the answer's text
    blocks: Numbers  # latent blocks
    latents: Numbers  # in all blocks of a row
    latent_sizes: Numbers  # [all blocks]: K of each, row by row
    image_pads: Numbers
    input_patches: Numbers
    helper_patches: Numbers  # stage 1 only

    @property
    def pads(self) -> Numbers:
        """Image and latent pads."""
        return self.image_pads + self.latents

    @property
    def tokens(self) -> Numbers:
        return self.question + self.answer + self.latents + MARKERS * self.blocks


def row_sizes(index: Index, image_tokens: ImageTokens, stage: Stage, latent_size: int) -> RowSizes:
    """tokens = template + characters / CHARS_PER_TOKEN + merged patches of the input images + K per latent block.

    Helper images enter the tower in stage 1 only.
    """
    samples = index.samples
    inputs, helpers = (samples[f"{kind}_images"].astype(np.int64) for kind in ("input", "helper"))
    tokens = image_tokens(index.images)
    counts = np.stack([inputs, helpers], axis=1).reshape(-1)
    image_pads, helper_tokens = sums(tokens, counts).reshape(-1, 2).T
    has_latents, encodes_helpers = int(stage != "text"), int(stage == "stage1")
    blocks = has_latents * samples["latent_blocks"].astype(np.int64)
    latent_sizes = index.block_sizes(latent_size) if has_latents else np.zeros(0, np.int64)
    question, answer = (samples[f"{text}_chars"].astype(np.int64) for text in ("question", "answer"))
    return RowSizes(
        question=TEMPLATE_TOKENS - (-question // CHARS_PER_TOKEN) + image_pads + MARKERS * inputs,
        answer=-(-answer // CHARS_PER_TOKEN),
        blocks=blocks,
        latents=sums(latent_sizes, blocks),
        latent_sizes=latent_sizes,
        image_pads=image_pads,
        input_patches=CELL_PATCHES * image_pads,
        helper_patches=encodes_helpers * CELL_PATCHES * helper_tokens,
    )


@dataclass(frozen=True)
class Costs:
    """What n samples cost: arrays [n]."""

    tokens: Numbers
    costs: Numbers  # in patches: TOKEN_PATCHES per token; without passes
    passes: Numbers | int = 0  # latents that are fed back, each in a pass; 0: none are

    def of(self, numbers: Numbers) -> "Costs":
        """Those of some of them."""
        passes = self.passes if isinstance(self.passes, int) else self.passes[numbers]
        return Costs(self.tokens[numbers], self.costs[numbers], passes)

    def in_rows(self, rows: int) -> Numbers:
        """In patches: what samples cost in micro-batches of so many rows."""
        # Rows of a micro-batch share their passes, so that no share of them is a sample's own before the rows are
        # dealt. A row that is alone makes its own.
        return self.costs + TOKEN_PATCHES * PASS_TOKENS * self.passes if rows == 1 else self.costs


@dataclass(frozen=True)
class SampleCosts:
    """What the samples of a folder cost, measured for those that are asked for: tokens, tower and passes."""

    index: Entries
    image_tokens: ImageTokens
    stage: Stage
    latent_size: int
    # Helper images are encoded in the first epoch only (`model.cache_targets`), so they count nothing.
    keeps_targets: bool = False
    # [num_samples]: counted tokens of each without its pads; None: estimated from the characters.
    texts: npt.NDArray[np.int32] | None = None
    most_tokens: int | None = None  # no sample has more: of a planner, as a run refuses samples that are longer

    def of(self, numbers: Numbers) -> Costs:
        """Of these samples."""
        sizes = row_sizes(self.index.take(numbers), self.image_tokens, self.stage, self.latent_size)
        tokens = sizes.tokens if self.texts is None else sizes.pads + self.texts[numbers]
        if self.most_tokens is not None:
            tokens = np.minimum(tokens, self.most_tokens)
        patches = sizes.input_patches + (0 if self.keeps_targets else sizes.helper_patches)
        passes = sizes.latents if self.stage == "stage2" else np.zeros_like(tokens)
        return Costs(tokens, TOKEN_PATCHES * tokens + patches, passes)

    def all(self) -> Costs:
        """Of every sample, in the order of their numbers."""
        return concatenated([self.of(numbers) for numbers in parts_of(len(self.index))])


def concatenated(parts: Sequence[Costs]) -> Costs:
    """The costs of the samples of each part, one part behind the other."""
    return Costs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "costs", "passes")))


@dataclass(frozen=True)
class SetCosts:
    """What the samples of several folders cost, numbered one folder after the other."""

    parts: tuple[SampleCosts, ...]

    def __len__(self) -> int:
        return sum(len(part.index) for part in self.parts)

    def of(self, numbers: Numbers) -> Costs:
        """Of these samples."""
        found = np.zeros((3, len(numbers)), np.int64)
        first = 0
        for part in self.parts:
            chosen = np.flatnonzero((numbers >= first) & (numbers < first + len(part.index)))
            if len(chosen):
                costs = part.of(numbers[chosen] - first)
                found[:, chosen] = costs.tokens, costs.costs, costs.passes
            first += len(part.index)
        return Costs(*found)

    def all(self) -> Costs:
        """Of every sample, in the order of their numbers."""
        return concatenated([part.all() for part in self.parts])
