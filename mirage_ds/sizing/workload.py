"""Size of the rows: tokens, patches, supervised tokens. From the index of the shards if there are any, else assumed.

By data/costs.py, which needs no tokenizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.config import Config
from mirage_ds.data.alignment import PASS_TOKENS
from mirage_ds.data.costs import CHARS_PER_TOKEN, MARKERS, row_sizes
from mirage_ds.data.folders import find_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.index import Index, IndexEntry
from mirage_ds.data.mixture import order_of
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.paths import without_secrets

PIXEL_LIMITS = (3136, 12_845_056)  # preprocessor_config.json of Qwen2.5-VL-Instruct: 4 and 16384 merged patches
ASSUMED = IndexEntry(
    key="assumed",
    shard=0,
    offset=0,
    size=0,
    input_sizes=[(512, 512)],
    helper_sizes=[(512, 512)],
    question_chars=600,
    answer_chars=1500,
    image_blocks=1,
    latent_blocks=1,
)
"""The row that is assumed without shards."""


@dataclass(frozen=True)
class Row:
    """The size of one row; the numbers of a mean are rounded."""

    tokens: int  # columns of the decoder
    targets: int  # supervised tokens
    patches: int  # into the tower, before groups of four are merged
    # Of a rollout, which makes 1 + blocks + single_columns passes; 0 elsewhere.
    blocks: int = 0  # latent blocks: after the last latent of each, a pass over all columns up to the next block
    single_columns: int = 0  # passes over one column: K - 1 of each block
    past: int = 0  # columns whose keys and values a later pass uses: those before the last latent
    attended: int = 0  # columns that each pass with a mask attends to, added up; of a packed row its own

    @property
    def latents(self) -> int:
        """Latents that are fed back: passes after the first."""
        return self.blocks + self.single_columns


SIZES = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Shape:
    """How the columns of one row follow each other, with N latent blocks that are fed back: each column begins a pass.

    Like data/alignment.py, a row of stage 2 without latents has a block of size 0 at the end of its question.
    """

    stretches: tuple[int, ...]  # [N + 1]: columns before each block, after the block before it; and after the last one
    latent_sizes: tuple[int, ...]  # [N]: K of each block
    targets: int
    patches: int

    def row(self) -> Row:
        """Its numbers."""
        lengths = [stretch + size for stretch, size in zip(self.stretches, (*self.latent_sizes, 0), strict=True)]
        starts = [0, *accumulate(lengths)]  # of each stretch, and the end of the last one
        ends = [start + stretch for start, stretch in zip(starts, self.stretches, strict=False)]
        blocks, latents = sum(map(bool, self.latent_sizes)), sum(self.latent_sizes)
        return Row(
            tokens=ends[-1],
            targets=self.targets,
            patches=self.patches,
            blocks=blocks,
            single_columns=latents - blocks,
            past=starts[-2] - 1 if blocks else 0,
            attended=sum(ends) if blocks else 0,
        )


@dataclass(frozen=True)
class Workload:
    """The rows of a run. Memory depends on the largest, time on the mean."""

    shapes: Sequence[Shape]  # of every sample, in the order of their numbers; without shards, of an assumed one
    num_samples: int | None  # of an epoch; None: unknown
    source: str
    token_budget: int | None = None  # of packed rows
    masked: bool = False  # see `masks_samples`

    @cached_property
    def rows(self) -> list[Row]:
        return [shape.row() for shape in self.shapes]

    @cached_property
    def largest(self) -> Row:
        """No row is larger than this in any of its sizes: a full one, if rows are packed."""
        if self.token_budget is not None:
            return packed_row(self.rows, self.token_budget, masked=self.masked)
        return Row(**{name: max(getattr(row, name) for row in self.rows) for name in SIZES})

    @cached_property
    def mean(self) -> Row:
        return Row(**{name: round(sum(getattr(row, name) for row in self.rows) / len(self.rows)) for name in SIZES})

    @cached_property
    def aligned(self) -> Row:
        """As `largest`, where any rows may meet in one micro-batch, and are padded on the left."""
        row = aligned(self.shapes).row()
        return replace(row, attended=row.attended + row.single_columns * row.past)

    def largest_of(self, size: int) -> Row:
        """What no row takes more than, padding included, in micro-batches of `size`.

        Rows are only aligned where that is not dearer than rows from the left, whose passes are at most those of `size`
        rows: see data/alignment.py.
        """
        if size == 1:
            return self.largest
        tokens = min(self.aligned.tokens, self.largest.tokens + PASS_TOKENS * self.largest.latents)
        return replace(self.aligned, tokens=tokens, past=min(self.aligned.past, tokens))

    def mean_of(self, size: int) -> Row:
        """The mean row, with the passes of `size` random rows that make them together.

        These are the sums over the blocks of one ordinal of the largest K, of which this is the expected value.
        """
        chances = np.diff((np.arange(len(self.shapes) + 1) / len(self.shapes)) ** size)  # that the i-th is the largest
        ordinals = zip_longest(*(shape.latent_sizes for shape in self.shapes), fillvalue=0)
        largest = np.array([np.sort(sizes) for sizes in ordinals]).reshape(-1, len(self.shapes))
        blocks, latents = ((values @ chances).sum() for values in (largest > 0, largest))
        return replace(self.mean, blocks=round(blocks), single_columns=round(latents - blocks))


def aligned(shapes: Sequence[Shape]) -> Shape:
    """What rows become whose blocks of the same ordinal start in one column: no micro-batch of them is larger.

    (data/alignment.py does not align rows of which this would make too long ones, but they have other passes.)
    """
    most = range(max(len(shape.latent_sizes) for shape in shapes))
    stretches = [max(shape.stretches[i] for shape in shapes if i < len(shape.latent_sizes)) for i in most]
    sizes = [max(shape.latent_sizes[i] for shape in shapes if i < len(shape.latent_sizes)) for i in most]
    starts = [0, *accumulate(stretch + size for stretch, size in zip(stretches, sizes, strict=True))]
    end = max(starts[len(shape.latent_sizes)] + shape.stretches[-1] for shape in shapes)
    return Shape(
        stretches=(*stretches, end - starts[-1]),
        latent_sizes=tuple(sizes),
        targets=max(shape.targets for shape in shapes),
        patches=max(shape.patches for shape in shapes),
    )


def workload(config: Config) -> Workload:
    """From the run's shards, or from the assumed row.

    Raises:
        DataError: the shards' manifest or index is damaged.
    """
    processor, helpers, num_samples = image_processor(config), Helpers.of(config), None
    where, shards = ", ".join(without_secrets(str(each.path)) for each in config.data.sets), find_folders(config.data)
    if shards is not None:
        parts = (part for folder in shards.folders for part in helpers.index(folder).parts())
        shapes = [shape for part in parts for shape in measure(part, config, processor)]
        num_samples = order_of(config, shards).num_positions
        source = f"image sizes from {where}, text at {CHARS_PER_TOKEN} characters per token"
    else:
        shapes = measure(Index.of([helpers.entry(ASSUMED, ASSUMED)]), config, processor)
        source = (
            f"no shards at {where}; assumed: an image and a helper image of 512 x 512 pixels, "
            f"{ASSUMED.question_chars} + {ASSUMED.answer_chars} characters"
        )
    return Workload(shapes, num_samples, source, config.data.token_budget, masks_samples(config))


def measure(index: Index, config: Config, processor: ImageProcessor) -> list[Shape]:
    """Rows by data/costs.py."""
    sizes = row_sizes(index, processor.image_tokens, config.train.stage, config.model.latent_size)
    latent_sizes, starts = sizes.latent_sizes.tolist(), np.cumsum(sizes.blocks) - sizes.blocks
    columns = (starts, sizes.blocks, sizes.question, sizes.answer, sizes.input_patches + sizes.helper_patches)
    return [
        shape_of(config, question, answer, latent_sizes[start : start + blocks], patches)
        for start, blocks, question, answer, patches in zip(*(each.tolist() for each in columns), strict=True)
    ]


def shape_of(config: Config, question: int, answer: int, sizes: Sequence[int], patches: int) -> Shape:
    """A row of so many tokens of question and text of the answer, with latent blocks of these K.

    Latents are fed back in stage 2 only.

    The positions of the blocks in the answer are not in the index: they are assumed to cut its text into equal parts.

    Where images are hidden, the column after the first block begins a pass as one more latent of it would: the only one
    in stage 1.
    """
    stage = config.train.stage
    answer += MARKERS * len(sizes)
    if config.data.max_length is not None:  # longer rows are refused, so that their text has fewer tokens than assumed
        over = max(0, question + answer + sum(sizes) - config.data.max_length)
        answer, question = max(0, answer - over), question - max(0, over - answer)
    cuts = [answer * part // (len(sizes) + 1) for part in range(len(sizes) + 2)]
    before, *after = [end - start for start, end in pairwise(cuts)]
    stretches: tuple[int, ...] = (question + before, *after) if sizes else (question, before)
    hides, fed_back = config.hides_images and bool(sizes), tuple(sizes or (0,))
    if stage != "stage2":
        rest = answer - before + sum(sizes[1:])
        stretches = (question + before + sizes[0], rest) if hides else (question + answer + sum(sizes),)
        fed_back = (0,) if hides else ()
    if hides:
        stretches = (stretches[0], max(0, stretches[1] - 1), *stretches[2:])
        fed_back = (fed_back[0] + 1, *fed_back[1:])
    return Shape(
        stretches=stretches,
        latent_sizes=fed_back,
        targets=answer,
        patches=patches,
    )


def packed_row(rows: Sequence[Row], budget: int, *, masked: bool) -> Row:
    """A full packed row of `budget` tokens; no choice of samples has more targets or patches than it.

    For each of the two that is the samples with the most per token, the last one in part. Samples may stand there more
    than once only where all of them together do not fill the row.
    """
    times = -(-budget // sum(row.tokens for row in rows))

    def most(name: str) -> int:
        room, found = float(budget), 0.0
        for row in sorted(rows, key=lambda row: getattr(row, name) / row.tokens, reverse=True):
            share = min(times, room / row.tokens)
            found, room = found + share * getattr(row, name), room - share * row.tokens
        return math.ceil(found)

    attended = budget if masked else 0
    return Row(tokens=budget, targets=most("targets"), patches=most("patches"), attended=attended)


def masks_samples(config: Config) -> bool:
    """Whether packed samples are kept apart by a mask: with sdpa, which `auto` may become."""
    return config.data.packing and config.model.attention != "flash_attention_2"


def image_processor(config: Config) -> ImageProcessor:
    """The processor of the model folder, or of the published models, with the run's pixel limits."""
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    if Path(config.model.path).is_dir():
        return ImageProcessor.load(config.model.path, config.model.cache_dir, **limits)
    smallest, largest = (given or known for given, known in zip(limits.values(), PIXEL_LIMITS, strict=True))
    return ImageProcessor(Qwen2VLImageProcessorPil(size={"shortest_edge": smallest, "longest_edge": largest}))
