"""Whether helper images have enough patches for the latents that they are pooled to. Known from their sizes alone."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mirage_ds.config import CompressStrategy
from mirage_ds.data.index import Entries
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import DataError
from mirage_ds.ops.segments import image_segments


def pooling_fault(
    grids: Sequence[tuple[int, int]], latent_sizes: Sequence[int], strategy: CompressStrategy
) -> tuple[int, str] | None:
    """The first image that cannot be pooled to its K, and why; None: all can.

    Args:
        grids: rows and columns of merged patches of each image; none where helper images are not encoded.
    """
    for number, ((rows, columns), size) in enumerate(zip(grids, latent_sizes, strict=False)):
        try:
            image_segments(rows, columns, size, strategy)
        except ValueError as error:
            return number, str(error)
    return None


def check_pooling(
    grids: Sequence[tuple[int, int]], latent_sizes: Sequence[int], strategy: CompressStrategy, name: str
) -> None:
    """Refuses what `pooling_fault` finds in a training sample; the arguments are the same.

    Raises:
        DataError: it names the image NAME_NUMBER.
    """
    if fault := pooling_fault(grids, latent_sizes, strategy):
        number, reason = fault
        raise DataError(
            f"{reason} ({name}_{number}); expected the row's latent_size, else model.latent_size <= merged patches, "
            "and with model.compress_strategy=grid a product of two factors that fit into their rows and columns; use "
            "a larger image or data.min_pixels, or set another model.latent_size, or another latent_size in the row"
        )


def check_all_pooling(
    index: Entries,
    folder: ShardFolder,
    grids_of: Callable[[npt.ArrayLike], npt.NDArray[np.int64]],
    latent_size: int,
    strategy: CompressStrategy,
) -> None:
    """Refuses what `check_pooling` refuses, in any sample of a folder.

    Args:
        grids_of: rows and columns of merged patches [N, 2] of images whose files have these sizes [N, 2].
        latent_size: the configured K.
    Raises:
        DataError: it names the first sample with such an image.
    """
    known: set[tuple[int, ...]] = set()  # rows, columns and K that fit: data sets have few
    for part in index.parts():
        sizes, latent_sizes = part.helper_images(latent_size)
        new = set(map(tuple, np.column_stack([grids_of(sizes), latent_sizes]).tolist())) - known
        known |= new
        if not any(pooling_fault([(rows, columns)], [size], strategy) for rows, columns, size in new):
            continue
        for entry in part:
            grids = [(rows, columns) for rows, columns in grids_of(entry.helper_sizes).tolist()]
            key = f"{folder.manifest.shards[entry.shard].name}/{entry.key}"
            check_pooling(grids, entry.block_sizes(latent_size), strategy, f"{key}.helper")
