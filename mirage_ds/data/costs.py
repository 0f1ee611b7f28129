"""The size of every row of a folder of shards, from its index: no sample is read. What the deal levels by.

Image tokens and latents are exact: the index has the size of every image, from which the processor's rule gives the
patches. Text is estimated from its number of characters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirage_ds.batch import CELL_PATCHES
from mirage_ds.config import Stage
from mirage_ds.data.index import IndexEntry

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

ImageTokens = Callable[[Sequence[tuple[int, int]]], list[int]]
"""Tokens of images of these sizes (width, height): `ImageProcessor.image_tokens`."""


@dataclass(frozen=True)
class RowSize:
    """The size of one row in a stage."""

    question: int  # tokens, with the chat template, images and their markers
    answer: int  # tokens of the answer's text
    latent_sizes: tuple[int, ...]  # K of each latent block
    pads: int  # of all these, image and latent pads
    input_patches: int
    helper_patches: int  # stage 1 only

    @property
    def tokens(self) -> int:
        return self.question + self.answer + sum(self.latent_sizes) + MARKERS * len(self.latent_sizes)


def row_size(entry: IndexEntry, image_tokens: ImageTokens, stage: Stage, latent_size: int) -> RowSize:
    """tokens = template + characters / CHARS_PER_TOKEN + merged patches of the input images + K per latent block.

    Helper images enter the tower in stage 1 only.
    """
    images = image_tokens(entry.input_sizes)
    helpers = image_tokens(entry.helper_sizes) if stage == "stage1" else []
    latent_sizes = [] if stage == "text" else entry.block_sizes(latent_size)
    return RowSize(
        question=TEMPLATE_TOKENS - (-entry.question_chars // CHARS_PER_TOKEN) + sum(images) + MARKERS * len(images),
        answer=-(-entry.answer_chars // CHARS_PER_TOKEN),
        latent_sizes=tuple(latent_sizes),
        pads=sum(images) + sum(latent_sizes),
        input_patches=CELL_PATCHES * sum(images),
        helper_patches=CELL_PATCHES * sum(helpers),
    )


@dataclass(frozen=True)
class Costs:
    """What the samples of a folder cost, in the order of their numbers: arrays, which forked workers share."""

    tokens: npt.NDArray[np.int64]  # [num_samples]
    costs: npt.NDArray[np.int64]  # [num_samples], in patches: TOKEN_PATCHES per token; without passes
    passes: npt.NDArray[np.int64] | int = 0  # [num_samples]: latents that are fed back, each in a pass; 0: none are

    def in_rows(self, rows: int) -> npt.NDArray[np.int64]:
        """[num_samples], in patches: what samples cost in micro-batches of so many rows."""
        # Rows of a micro-batch share their passes, so that no share of them is a sample's own before the rows are
        # dealt. A row that is alone makes its own.
        return self.costs + TOKEN_PATCHES * PASS_TOKENS * self.passes if rows == 1 else self.costs


def measure_costs(
    entries: Iterable[IndexEntry],
    image_tokens: ImageTokens,
    *,
    stage: Stage,
    latent_size: int,
    keeps_targets: bool = False,
    texts: npt.NDArray[np.int32] | None = None,
) -> Costs:
    """Tokens, tower and passes of every sample.

    Args:
        entries: a folder's index.
        texts: counted tokens of each sample without its pads; None: estimated from the characters.
        keeps_targets: helper images are encoded in the first epoch only (`model.cache_targets`), so they count nothing.
    """

    def numbers(number: int, entry: IndexEntry) -> tuple[int, int, int]:
        size = row_size(entry, image_tokens, stage, latent_size)
        tokens = size.tokens if texts is None else size.pads + int(texts[number])
        passes = sum(size.latent_sizes) if stage == "stage2" else 0
        return tokens, size.input_patches + (0 if keeps_targets else size.helper_patches), passes

    measured = np.array([numbers(*each) for each in enumerate(entries)], dtype=np.int64)
    tokens, patches, passes = measured.T.copy()
    return Costs(tokens, TOKEN_PATCHES * tokens + patches, passes)


def joined(parts: Sequence[Costs]) -> Costs:
    """Of the samples of several folders, numbered one folder after the other."""
    if len(parts) == 1:
        return parts[0]
    tokens, costs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "costs"))
    return Costs(tokens, costs, np.concatenate([np.broadcast_to(part.passes, len(part.tokens)) for part in parts]))
