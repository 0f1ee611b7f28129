"""The shape of an encoded sample, counted token by token: what the planner estimates from an index."""

from itertools import groupby

from mirage_ds.data.encode import EncodedSample
from mirage_ds.sizing.workload import Shape
from mirage_ds.tokens import IGNORE_INDEX


def shape_of(sample: EncodedSample, stage: str) -> Shape:
    """Stage 2 cuts it at its latent blocks, or at the end of its question; other stages make one pass over it.

    If its images are hidden, each also cuts it before the column after the first block's last latent.
    """
    tokens = len(sample.input_ids)
    runs = [(is_latent, len(list(run))) for is_latent, run in groupby(sample.latent_mask.tolist())]
    stretches, sizes = [], []
    for is_latent, length in runs:
        (sizes if is_latent else stretches).append(length)
    if not sizes:
        stretches, sizes = [sample.prompt_length, tokens - sample.prompt_length], [0]
    if stage != "stage2":
        lead = stretches[0] + sizes[0]
        stretches, sizes = ([lead, tokens - lead], [0]) if sample.hides_images else ([tokens], [])
    if sample.hides_images:
        stretches[1], sizes[0] = stretches[1] - 1, sizes[0] + 1
    return Shape(
        stretches=tuple(stretches),
        latent_sizes=tuple(sizes),
        targets=int((sample.labels[1:] != IGNORE_INDEX).sum()),
        patches=len(sample.pixel_values) + len(sample.pixel_values_latent),
    )
