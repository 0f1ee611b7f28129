"""The segments of a helper image: segment k is the set of patches that are pooled to latent target k, k = 0 .. K-1.

With n = rows * columns patches of an image in raster order, model.compress_strategy chooses:

    average      [k * g, (k + 1) * g), g = n // K: the last n - K * g patches are dropped, as the reference does
                 (UMass-Embodied-AGI/Mirage at 53f26de, modeling_qwen2_5_vl.py:2089-2143)
    average_all  [k * n // K, (k + 1) * n // K): every patch is in one segment; sizes differ by at most one patch
    grid         the image plane as r x c = K cells, in raster order; cell (i, j) has the patch rows
                 [floor(i * rows / r), ceil((i + 1) * rows / r)) and likewise the columns, so that neighbours share
                 patches where the sizes do not divide: torch.nn.AdaptiveAvgPool2d

The reference has no `grid`. Its r and c, with r * c = K, are our choice: the pair whose cells are nearest to squares;
of two equally near pairs the one with fewer rows.

Segments are plain numbers on the host: the encoder uses them to check samples, the model to pool.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch

from mirage_ds.config import CompressStrategy


class Segments(NamedTuple):
    """N segments over the patches of any number of images, as `latent_pool` takes them."""

    bounds: torch.Tensor  # [N, 2] int64: each segment's begin and end, in `patch_index`, or without it in the patches
    patch_index: torch.Tensor | None  # [M] int64: the patches in the order in which the segments read them


def batch_segments(
    grids: Sequence[tuple[int, int]], latent_sizes: Sequence[int], strategy: CompressStrategy
) -> Segments | None:
    """The segments of a micro-batch's helper images, whose patches are concatenated image by image.

    Args:
        grids: patch rows and columns of each image.
        latent_sizes: K of each image.

    Returns:
        The segments, or None if there is no image.

    Raises:
        ValueError: see `image_segments`.
    """
    if not grids:
        return None
    images = [image_segments(*grid, size, strategy) for grid, size in zip(grids, latent_sizes, strict=True)]
    first_patches = _starts(rows * columns for rows, columns in grids)
    if strategy != "grid":
        return Segments(torch.cat([i.bounds + first for i, first in zip(images, first_patches, strict=True)]), None)
    indices = [image.patch_index for image in images if image.patch_index is not None]
    offsets = _starts(map(len, indices))
    return Segments(
        torch.cat([image.bounds + offset for image, offset in zip(images, offsets, strict=True)]),
        torch.cat([index + first for index, first in zip(indices, first_patches, strict=True)]),
    )


@lru_cache(maxsize=4096)
def image_segments(rows: int, columns: int, latent_size: int, strategy: CompressStrategy) -> Segments:
    """The segments of one image of rows x columns patches. The result is cached: do not write into it.

    Raises:
        ValueError: the image has too few patches for `latent_size`, or no grid of so many cells fits.
    """
    num_patches = rows * columns
    if not 1 <= latent_size <= num_patches:
        raise ValueError(f"the helper image has {num_patches} merged patches for {latent_size} latents")
    if strategy == "grid":
        return _grid_segments(rows, columns, latent_size)
    edges = torch.arange(latent_size + 1)
    edges = edges * (num_patches // latent_size) if strategy == "average" else edges * num_patches // latent_size
    return Segments(torch.stack([edges[:-1], edges[1:]], dim=1), None)


def grid_shape(rows: int, columns: int, latent_size: int) -> tuple[int, int]:
    """Rows and columns of cells for `grid`: their product is K, and the cells are as square as possible.

    Raises:
        ValueError: every such pair has more rows or columns than the image.
    """
    factors = [(r, latent_size // r) for r in range(1, latent_size + 1) if latent_size % r == 0]
    fitting = [(r, c) for r, c in factors if r <= rows and c <= columns]
    if not fitting:
        raise ValueError(f"no grid of {latent_size} cells fits the helper image's {rows} x {columns} merged patches")

    def elongation(shape: tuple[int, int]) -> Fraction:
        aspect = Fraction(rows * shape[1], columns * shape[0])  # of a cell
        return max(aspect, 1 / aspect)

    return min(fitting, key=lambda shape: (elongation(shape), shape))


def _grid_segments(rows: int, columns: int, latent_size: int) -> Segments:
    cell_rows, cell_columns = grid_shape(rows, columns, latent_size)
    patches = torch.arange(rows * columns).view(rows, columns)
    cells = [
        patches[top:bottom, left:right].flatten()
        for top, bottom in _adaptive_edges(rows, cell_rows)
        for left, right in _adaptive_edges(columns, cell_columns)
    ]
    ends = torch.tensor([len(cell) for cell in cells]).cumsum(0)
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return Segments(torch.stack([begins, ends], dim=1), torch.cat(cells))


def _adaptive_edges(size: int, num_cells: int) -> list[tuple[int, int]]:
    return [(i * size // num_cells, -(-(i + 1) * size // num_cells)) for i in range(num_cells)]


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where each of several concatenated pieces starts."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
