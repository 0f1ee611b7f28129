"""Sizes of rows: tokens, patches, supervised tokens, passes; of one, of a run's largest and mean, of packed ones.

Arithmetic alone; measured.py says which rows a run has.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from mirage_ds.data.alignment import PASS_TOKENS
from mirage_ds.data.ragged import Numbers

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
    later: Size = 0  # columns of the passes after the first
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
    weight: float = 1  # how often its rows stand in an epoch

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
            later=(ends[-1] - ends[0]) * (blocks > 0),
            past=(starts[-2] - 1) * (blocks > 0),
            attended=sum(ends) * (blocks > 0),
        )

    def each(self, change: Callable[[Size], Size]) -> "Shape":
        """Every number changed."""
        stretches, latent_sizes = tuple(map(change, self.stretches)), tuple(map(change, self.latent_sizes))
        targets, patches, numbers = map(change, (self.targets, self.patches, self.numbers))
        return Shape(stretches, latent_sizes, targets, patches, numbers, self.weight)

    def at(self, place: int) -> "Shape":
        """One of n rows."""
        return self.each(lambda values: int(np.broadcast_to(values, np.size(self.numbers))[place]))


class Seen:
    """What is kept of shapes, however many there are."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        self.count = 0
        self.weight = 0.0  # of all: rows of an epoch
        self.sums, self.largest = dict.fromkeys(SIZES, 0.0), dict.fromkeys(SIZES, 0)  # sums: of an epoch
        self.by_blocks: dict[int, Shape] = {}  # of those with so many blocks the largest of each number
        # Of the blocks of each ordinal: how many of an epoch have which K.
        self.block_sizes: list[dict[int, float]] = []
        for shape in shapes:
            self._see(shape)

    def _see(self, shape: Shape) -> None:
        count, row, blocks = np.size(shape.numbers), shape.row(), len(shape.latent_sizes)
        self.count += count
        self.weight += shape.weight * count
        for name in SIZES:
            values = np.broadcast_to(getattr(row, name), count)
            self.sums[name] += shape.weight * int(values.sum())
            self.largest[name] = max(self.largest[name], int(values.max()))
        most = self.by_blocks.get(blocks, shape.at(0))
        self.by_blocks[blocks] = Shape(
            stretches=tuple(map(largest, most.stretches, shape.stretches)),
            latent_sizes=tuple(map(largest, most.latent_sizes, shape.latent_sizes)),
            targets=largest(most.targets, shape.targets),
            patches=largest(most.patches, shape.patches),
        )
        self.block_sizes += [defaultdict(float) for _ in range(blocks - len(self.block_sizes))]
        for counted, sizes in zip(self.block_sizes, shape.latent_sizes, strict=False):
            for kind, number in zip(*np.unique(np.broadcast_to(sizes, count), return_counts=True), strict=True):
                counted[int(kind)] += shape.weight * int(number)


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
        """Of an epoch, in which the rows of each folder stand as often as its weight says."""
        return Row(**{name: round(total / self._seen.weight) for name, total in self._seen.sums.items()})

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
            counts = {0: 0.0} | counted
            counts[0] += self._seen.weight - sum(counted.values())  # rows without this block: as of size 0
            sizes = np.array(sorted(counts))
            up_to = np.cumsum([counts[each] for each in sizes.tolist()]) / self._seen.weight
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
