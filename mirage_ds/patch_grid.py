"""The grid of an image's patches: what the tower merges, and how many an image of any size has. Needs no torch."""

import numpy as np
import numpy.typing as npt

MERGE_SIZE = 2  # the tower merges 2 x 2 patches, which follow each other, into one embedding
CELL_PATCHES = MERGE_SIZE**2
Grid = tuple[int, int]  # rows and columns of an image's merged patches


def smart_grids(sizes: npt.NDArray[np.int64], side: int, min_pixels: int, max_pixels: int) -> npt.NDArray[np.int64]:
    """[N, 2]: what transformers' `smart_resize` gives for each of [N, 2] sizes, in units of `side`.

    The same operations on float64 in the same order, so that the results are equal. Unlike there, sizes of any aspect
    ratio are accepted: images are checked where they are built into shards.
    """
    pixels = sizes.prod(axis=1, keepdims=True)
    grids = np.round(sizes / side)  # half to even, as Python's
    resized = grids.prod(axis=1, keepdims=True) * side**2
    smaller = np.maximum(1, np.floor(sizes / np.sqrt(pixels / max_pixels) / side))
    larger = np.ceil(sizes * np.sqrt(min_pixels / pixels) / side)
    return np.where(resized > max_pixels, smaller, np.where(resized < min_pixels, larger, grids)).astype(np.int64)
