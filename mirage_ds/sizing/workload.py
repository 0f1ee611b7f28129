"""Size of the rows: tokens, patches, supervised tokens. From the index of the shards if there are any, else assumed.

By data/costs.py, which needs no tokenizer. The rows of a folder are measured a part at a time, and no part is kept.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.config import Config
from mirage_ds.data.alignment import PASS_TOKENS
from mirage_ds.data.columns import Entries, Index, IndexEntry, parts_of
from mirage_ds.data.costs import CHARS_PER_TOKEN, MARKERS, row_sizes
from mirage_ds.data.folders import find_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.mixture import order_of
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.ragged import Numbers, starts
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


Size = Any  # an integer; of n rows at once an array [n] of them


@dataclass(frozen=True)
class Row:
    """The size of one row, or of n rows at once; the numbers of a mean are rounded."""

    tokens: Size  # columns of the decoder
    targets: Size  # supervised tokens
    patches: Size  # into the tower, before groups of four are merged
    # Of a rollout, which makes 1 + blocks + single_columns passes; 0 elsewhere.
    blocks: Size = 0  # latent blocks: after the last latent of each, a pass over all columns up to the next block
    single_columns: Size = 0  # passes over one column: K - 1 of each block
    past: Size = 0  # columns whose keys and values a later pass uses: those before the last latent
    attended: Size = 0  # columns that each pass with a mask attends to, added up; of a packed row its own

    @property
    def latents(self) -> Size:
        """Latents that are fed back: passes after the first."""
        return self.blocks + self.single_columns


SIZES = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Shape:
    """How the columns of one row follow each other, with N latent blocks that are fed back: each column begins a pass.

    Or of n rows with as many blocks at once.

    Like data/alignment.py, a row of stage 2 without latents has a block of size 0 at the end of its question.
    """

    stretches: tuple[Size, ...]  # [N + 1]: columns before each block, after the block before it; and after the last one
    latent_sizes: tuple[Size, ...]  # [N]: K of each block
    targets: Size
    patches: Size
    numbers: Size = 0  # of the samples

    def row(self) -> Row:
        """Its numbers."""
        lengths = [stretch + size for stretch, size in zip(self.stretches, (*self.latent_sizes, 0), strict=True)]
        starts = [0, *accumulate(lengths)]  # of each stretch, and the end of the last one
        ends = [start + stretch for start, stretch in zip(starts, self.stretches, strict=False)]
        blocks, latents = sum(1 * (size > 0) for size in self.latent_sizes), sum(self.latent_sizes)
        return Row(
            tokens=ends[-1],
            targets=self.targets,
            patches=self.patches,
            blocks=blocks,
            single_columns=latents - blocks,
            past=(starts[-2] - 1) * (blocks > 0),
            attended=sum(ends) * (blocks > 0),
        )

    def each(self, change: Callable[[Size], Size]) -> "Shape":
        """Every number changed."""
        stretches, latent_sizes = tuple(map(change, self.stretches)), tuple(map(change, self.latent_sizes))
        return Shape(stretches, latent_sizes, *map(change, (self.targets, self.patches, self.numbers)))

    def at(self, place: int) -> "Shape":
        """One of n rows."""
        return self.each(lambda values: int(np.broadcast_to(values, np.size(self.numbers))[place]))


class Seen:
    """What is kept of shapes, however many there are."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        self.count = 0
        self.sums, self.largest = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
        self.by_blocks: dict[int, Shape] = {}  # of those with so many blocks the largest of each number
        self.block_sizes: list[Counter[int]] = []  # of the blocks of each ordinal: how many have which K
        for shape in shapes:
            self._see(shape)

    def _see(self, shape: Shape) -> None:
        count, row, blocks = np.size(shape.numbers), shape.row(), len(shape.latent_sizes)
        self.count += count
        for name in SIZES:
            values = np.broadcast_to(getattr(row, name), count)
            self.sums[name] += int(values.sum())
            self.largest[name] = max(self.largest[name], int(values.max()))
        most = self.by_blocks.get(blocks, shape.at(0))
        self.by_blocks[blocks] = Shape(
            stretches=tuple(map(largest, most.stretches, shape.stretches)),
            latent_sizes=tuple(map(largest, most.latent_sizes, shape.latent_sizes)),
            targets=largest(most.targets, shape.targets),
            patches=largest(most.patches, shape.patches),
        )
        self.block_sizes += [Counter() for _ in range(blocks - len(self.block_sizes))]
        for counter, sizes in zip(self.block_sizes, shape.latent_sizes, strict=False):
            kinds, counts = np.unique(np.broadcast_to(sizes, count), return_counts=True)
            counter.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))


def largest(known: int, values: Size) -> int:
    """The largest of some numbers and of one that is known."""
    return max(known, int(np.max(values)))


@dataclass(frozen=True)
class Workload:
    """The rows of a run. Memory depends on the largest, time on the mean."""

    shapes: Iterable[Shape]  # of every sample; without shards, of an assumed one
    num_samples: int | None  # of an epoch; None: unknown
    source: str
    token_budget: int | None = None  # of packed rows
    masked: bool = False  # see `masks_samples`

    @cached_property
    def _seen(self) -> Seen:
        return Seen(self.shapes)

    @property
    def num_rows(self) -> int:
        """Of the folders, each once."""
        return self._seen.count

    @cached_property
    def largest(self) -> Row:
        """No row is larger than this in any of its sizes: a full one, if rows are packed."""
        if self.token_budget is not None:
            return packed_row((shape.row() for shape in self.shapes), self.token_budget, masked=self.masked)
        return Row(**self._seen.largest)

    @cached_property
    def mean(self) -> Row:
        return Row(**{name: round(total / self._seen.count) for name, total in self._seen.sums.items()})

    @cached_property
    def aligned(self) -> Row:
        """As `largest`, where any rows may meet in one micro-batch, and are padded on the left."""
        row = aligned([*self._seen.by_blocks.values()]).row()
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
        blocks = latents = 0.0
        for counted in self._seen.block_sizes:
            counts = Counter({0: self._seen.count - counted.total()}) + counted  # rows without this block: as of size 0
            sizes = np.array(sorted(counts))
            up_to = np.cumsum([counts[each] for each in sizes.tolist()]) / self._seen.count
            chances = np.diff(up_to**size, prepend=0)  # that the largest is this one
            blocks, latents = blocks + float(chances[sizes > 0].sum()), latents + float(sizes @ chances)
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
        shapes = Measured([helpers.index(folder) for folder in shards.folders], config, processor)
        num_samples = order_of(config, shards).num_positions
        source = f"image sizes from {where}, text at {CHARS_PER_TOKEN} characters per token"
    else:
        shapes = Measured([Index.of([helpers.entry(ASSUMED, ASSUMED)])], config, processor)
        source = (
            f"no shards at {where}; assumed: an image and a helper image of 512 x 512 pixels, "
            f"{ASSUMED.question_chars} + {ASSUMED.answer_chars} characters"
        )
    return Workload(shapes, num_samples, source, config.data.token_budget, masks_samples(config))


@dataclass(frozen=True)
class Measured:
    """The shapes of the samples of folders, numbered one after the other; measured whenever they are asked for."""

    folders: Sequence[Entries]
    config: Config
    processor: ImageProcessor

    def __iter__(self) -> Iterator[Shape]:
        first = 0
        for index in self.folders:
            for numbers in parts_of(len(index)):
                yield from measure(index.take(numbers), first + numbers, self.config, self.processor)
            first += len(index)


def measure(index: Index, numbers: Numbers, config: Config, processor: ImageProcessor) -> Iterator[Shape]:
    """Of these samples by data/costs.py: those with as many blocks at once."""
    sizes = row_sizes(index, processor.image_tokens, config.train.stage, config.model.latent_size)
    first, patches = starts(sizes.blocks), sizes.input_patches + sizes.helper_patches
    for blocks in np.unique(sizes.blocks).tolist():
        own = np.flatnonzero(sizes.blocks == blocks)
        latent_sizes = [sizes.latent_sizes[first[own] + ordinal] for ordinal in range(blocks)]
        shape = shape_of(config, sizes.question[own], sizes.answer[own], latent_sizes, patches[own])
        yield replace(shape, numbers=numbers[own])


def shape_of(config: Config, question: Size, answer: Size, sizes: Sequence[Size], patches: Size) -> Shape:
    """Rows of so many tokens of question and text of the answer, with latent blocks of these K.

    Latents are fed back in stage 2 only.

    The positions of the blocks in the answer are not in the index: they are assumed to cut its text into equal parts.

    Where images are hidden, the column after the first block begins a pass as one more latent of it would: the only one
    in stage 1.
    """
    stage = config.train.stage
    answer = answer + MARKERS * len(sizes)
    if config.data.max_length is not None:  # longer rows are refused, so that their text has fewer tokens than assumed
        over = np.maximum(0, question + answer + sum(sizes) - config.data.max_length)
        answer, question = np.maximum(0, answer - over), question - np.maximum(0, over - answer)
    cuts = [answer * part // (len(sizes) + 1) for part in range(len(sizes) + 2)]
    before, *after = [end - start for start, end in pairwise(cuts)]
    stretches: tuple[Size, ...] = (question + before, *after) if sizes else (question, before)
    hides, fed_back = config.hides_images and bool(sizes), tuple(sizes or (0,))
    if stage != "stage2":
        rest = answer - before + sum(sizes[1:])
        stretches = (question + before + sizes[0], rest) if hides else (question + answer + sum(sizes),)
        fed_back = (0,) if hides else ()
    if hides:
        stretches = (stretches[0], np.maximum(0, stretches[1] - 1), *stretches[2:])
        fed_back = (fed_back[0] + 1, *fed_back[1:])
    return Shape(
        stretches=stretches,
        latent_sizes=fed_back,
        targets=answer,
        patches=patches,
    )


def packed_row(rows: Iterable[Row], budget: int, *, masked: bool) -> Row:
    """A full packed row of `budget` tokens; no choice of samples has more targets or patches than it.

    For each of the two that is the samples with the most per token, the last one in part. Samples may stand there more
    than once only where all of them together do not fill the row.
    """
    total, densest = 0, {name: np.zeros((2, 0), np.int64) for name in ("targets", "patches")}
    for row in rows:
        total += int(np.sum(row.tokens))
        for name, held in densest.items():
            densest[name] = fill(np.column_stack([held, np.vstack([row.tokens, getattr(row, name)])]), budget)
    times = -(-budget // total)

    def most(name: str) -> int:
        room, found = float(budget), 0.0
        for tokens, value in densest[name].T.tolist():
            share = min(times, room / tokens)
            found, room = found + share * value, room - share * tokens
        return math.ceil(found)

    attended = budget if masked else 0
    return Row(tokens=budget, targets=most("targets"), patches=most("patches"), attended=attended)


def fill(samples: Numbers, budget: int) -> Numbers:
    """[2, m]: of tokens and values of n samples [2, n] those that fill a packed row, most per token first."""
    ordered = samples[:, np.argsort(-samples[1] / samples[0], kind="stable")]
    return ordered[:, : np.searchsorted(np.cumsum(ordered[0]), budget) + 1]


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
