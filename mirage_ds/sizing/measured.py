"""The rows of a run: measured from the index of its shards if there are any, else assumed.

By data/costs.py, which needs no tokenizer. The rows of a folder are measured a part at a time, and no part is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.config import Config
from mirage_ds.data.columns import Entries, Index, IndexEntry, parts_of
from mirage_ds.data.costs import CHARS_PER_TOKEN, MARKERS, row_sizes
from mirage_ds.data.folders import find_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.mixture import order_of
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.ragged import Numbers, starts
from mirage_ds.paths import without_secrets
from mirage_ds.sizing.workload import Shape, Size, Workload

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


def workload(config: Config) -> Workload:
    """From the run's shards, or from the assumed row.

    Raises:
        DataError: the shards' manifest or index is damaged.
    """
    processor, helpers, num_samples = image_processor(config), Helpers.of(config), None
    where, shards = ", ".join(without_secrets(str(each.path)) for each in config.data.sets), find_folders(config.data)
    if shards is not None:
        order = order_of(config, shards)
        weights = [part.positions / part.plan.num_samples for part in order.parts]
        shapes = Measured([helpers.index(folder) for folder in shards.folders], weights, config, processor)
        num_samples = order.num_positions
        source = f"image sizes from {where}, text at {CHARS_PER_TOKEN} characters per token"
    else:
        assumed = Index.of([ASSUMED])
        shapes = Measured([helpers.rows(assumed, assumed)], [1], config, processor)
        source = (
            f"no shards at {where}; assumed: an image and a helper image of 512 x 512 pixels, "
            f"{ASSUMED.question_chars} + {ASSUMED.answer_chars} characters"
        )
    return Workload(shapes, num_samples, source, config.data.token_budget, masks_samples(config))


@dataclass(frozen=True)
class Measured:
    """The shapes of the samples of folders, numbered one after the other; measured whenever they are asked for."""

    folders: Sequence[Entries]
    weights: Sequence[float]  # how often the samples of each stand in an epoch
    config: Config
    processor: ImageProcessor

    def __iter__(self) -> Iterator[Shape]:
        first = 0
        for index, weight in zip(self.folders, self.weights, strict=True):
            for numbers in parts_of(len(index)):
                for shape in measure(index.take(numbers), first + numbers, self.config, self.processor):
                    yield replace(shape, weight=weight)
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
