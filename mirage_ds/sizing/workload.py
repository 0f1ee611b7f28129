"""Size of the rows: tokens, patches, supervised tokens. From the index of the shards if there are any, else assumed.

By data/costs.py, which needs no tokenizer.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.config import Config
from mirage_ds.data.costs import CHARS_PER_TOKEN, row_size
from mirage_ds.data.index import IndexEntry, load_index
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.shards import MANIFEST_NAME, ShardFolder, read_manifest

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
    lead: int  # columns before the first latent
    rest: int  # columns from the first latent on
    targets: int  # supervised tokens
    patches: int  # into the tower, before groups of four are merged


SIZES = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Workload:
    """The rows of a run. Memory depends on the largest, time on the mean."""

    largest: Row  # a packed one, if rows are packed
    mean: Row
    num_samples: int | None  # None: unknown
    source: str


def workload(config: Config) -> Workload:
    """From the run's shards, or from the assumed row.

    Raises:
        DataError: the shards' manifest or index is damaged.
    """
    if not (config.data.shards / MANIFEST_NAME).is_file():
        row = measure(ASSUMED, config, image_processor(config))
        source = (
            f"no shards at {config.data.shards}; assumed: an image and a helper image of 512 x 512 pixels, "
            f"{ASSUMED.question_chars} + {ASSUMED.answer_chars} characters"
        )
        return Workload(largest_of([row], config), row, None, source)
    rows = measure_all(read_manifest(config.data.shards), config)

    def mean(name: str) -> int:
        return round(sum(getattr(row, name) for row in rows) / len(rows))

    return Workload(
        largest=largest_of(rows, config),
        mean=Row(**{name: mean(name) for name in SIZES}),
        num_samples=len(rows),
        source=f"image sizes from {config.data.shards}, text at {CHARS_PER_TOKEN} characters per token",
    )


def measure_all(shards: ShardFolder, config: Config) -> list[Row]:
    """Every sample of the shards, in the order of their numbers.

    Raises:
        DataError: the index is damaged.
    """
    processor = image_processor(config)
    return [measure(entry, config, processor) for entry in load_index(shards)]


def largest_of(rows: list[Row], config: Config) -> Row:
    """No row of a micro-batch is larger than this in any of its sizes."""
    if config.data.packing and config.data.token_budget:
        return packed_row(rows, config.data.token_budget)
    return Row(**{name: max(getattr(row, name) for row in rows) for name in SIZES})


def packed_row(rows: list[Row], budget: int) -> Row:
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

    return Row(tokens=budget, lead=0, rest=budget, targets=most("targets"), patches=most("patches"))


def measure(entry: IndexEntry, config: Config, processor: ImageProcessor) -> Row:
    """A row by data/costs.py. The position of the latents in the answer is not in the index: `lead` assumes the middle
    of the answer's text."""
    size = row_size(entry, processor.image_tokens, config.train.stage, config.model.latent_size)
    limit = config.data.max_length or size.tokens  # longer rows are refused
    tokens, lead = min(limit, size.tokens), min(limit, size.question + size.answer // 2)
    return Row(
        tokens=tokens,
        lead=lead,
        rest=tokens - lead,
        targets=min(limit, size.answer + size.latents),
        patches=size.input_patches + size.helper_patches,
    )


def image_processor(config: Config) -> ImageProcessor:
    """The processor of the model folder, or of the published models, with the run's pixel limits."""
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    if Path(config.model.path).is_dir():
        return ImageProcessor.load(config.model.path, config.model.cache_dir, **limits)
    smallest, largest = (given or known for given, known in zip(limits.values(), PIXEL_LIMITS, strict=True))
    return ImageProcessor(Qwen2VLImageProcessorPil(size={"shortest_edge": smallest, "longest_edge": largest}))
