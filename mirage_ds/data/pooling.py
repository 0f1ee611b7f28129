"""Whether helper images have enough patches for the latents that they are pooled to. Known from their sizes alone."""

from collections.abc import Sequence

from mirage_ds.config import CompressStrategy
from mirage_ds.errors import DataError
from mirage_ds.ops.segments import image_segments

POOLING_REMEDY = (
    "the row's latent_size, else model.latent_size <= merged patches, and with model.compress_strategy=grid a product "
    "of two factors that fit into their rows and columns; use a larger image or data.min_pixels, or set another "
    "model.latent_size, or another latent_size in the row"
)


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
        raise DataError(f"{reason} ({name}_{number}); expected {POOLING_REMEDY}")
