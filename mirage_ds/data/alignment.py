"""In which columns the tokens of a micro-batch's rows lie, so that a rollout of stage 2 costs little.

Each column in which any row has a latent begins a pass (mirage_ds/model/rollout.py), and so does each from which on a
row's images are hidden. There are two ways to lay rows:

- aligned: blocks of the same ordinal start in one column. The stretch of text before each block is padded on the left,
  what follows a row's last block is not. The passes are at most the sum over the ordinals of the largest K, plus one.
- from the left: no row has padding between its tokens, so rows are as short as they can be. Blocks of different rows
  share columns by chance only.

Losses are the same. The first costs columns, where a stretch of one row is far longer than those of the others; the
second costs passes.

Shape legend: B rows, L columns, K latents per block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mirage_ds.data.costs import PASS_TOKENS
from mirage_ds.data.encode import EncodedSample


class Block(NamedTuple):
    """Where a block of a sample lies among its tokens."""

    stretch: int  # the first token after the block before it
    start: int  # its first latent; the token before it is its start marker


def cheapest_columns(samples: Sequence[EncodedSample]) -> list[torch.Tensor]:
    """The columns of each sample's tokens by the way that costs less; aligned if both cost the same.

    Rows without latents, as the prompts of decoding, are as long both ways: aligned, their prompts end in one column.
    """
    return min(aligned_columns(samples), columns_from_left(samples), key=lambda columns: cost(samples, columns))


def cost(samples: Sequence[EncodedSample], columns: Sequence[torch.Tensor]) -> int:
    """B * L + PASS_TOKENS * passes, in tokens."""
    starts: set[int | None] = set()
    for sample, each in zip(samples, columns, strict=True):
        starts |= {hide_column(sample, each), *each[sample.latent_mask].tolist()}
    return len(samples) * num_columns(columns) + PASS_TOKENS * (1 + len(starts - {None}))


def hide_column(sample: EncodedSample, columns: torch.Tensor) -> int | None:
    """The column from which on the row's images are hidden: after the last latent of its first block; None: none.

    The token there is <|latent_end|>, or padding before it.
    """
    if not (sample.hides_images and sample.latent_sizes and sample.image_mask.any()):
        return None
    return int(columns[sample.latent_mask][sample.latent_sizes[0] - 1]) + 1


def num_columns(columns: Sequence[torch.Tensor]) -> int:
    """L."""
    return max(int(each[-1]) for each in columns) + 1


def columns_from_left(samples: Sequence[EncodedSample]) -> list[torch.Tensor]:
    """All rows begin at column 0."""
    return [torch.arange(len(sample.input_ids)) for sample in samples]


def aligned_columns(samples: Sequence[EncodedSample]) -> list[torch.Tensor]:
    """Blocks of the same ordinal start in one column; the prompt of a row without blocks ends before the first ones."""
    columns, blocks = columns_from_left(samples), [_blocks(sample) for sample in samples]
    for ordinal in range(max(map(len, blocks))):
        rows = [(each, own[ordinal]) for each, own in zip(columns, blocks, strict=True) if ordinal < len(own)]
        start = max(int(each[block.start - 1]) for each, block in rows)
        for each, block in rows:
            each[block.stretch :] += start - int(each[block.start - 1])
    return columns


def _blocks(sample: EncodedSample) -> list[Block]:
    """The latent blocks, or one without latents at the end of the prompt."""
    if not sample.latent_sizes:
        return [Block(0, sample.prompt_length)]
    latents = [block.tolist() for block in sample.latent_mask.nonzero().flatten().split(sample.latent_sizes)]
    ends = [0, *(block[-1] + 1 for block in latents)]
    return [Block(end, block[0]) for end, block in zip(ends[:-1], latents, strict=True)]
