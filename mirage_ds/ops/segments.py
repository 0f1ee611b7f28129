"""How a helper image's patches are cut into K segments, each of which becomes one latent target.

With n = rows * columns patches of an image in raster order, and k = 0 .. K-1:

    average      [k * g, (k + 1) * g), g = n // K: the last n - K * g patches are dropped, as the reference does
                 (UMass-Embodied-AGI/Mirage at 53f26de, modeling_qwen2_5_vl.py:2089-2143)
    average_all  [k * n // K, (k + 1) * n // K): every patch is in one run, and runs differ by at most one patch
    grid         the image plane in r x c = K cells, in raster order; cell (i, j) has the patch rows
                 [floor(i * rows / r), ceil((i + 1) * rows / r)) and likewise the columns, so that neighbours share
                 patches where the sizes do not divide: torch.nn.AdaptiveAvgPool2d

For `grid` K means r * c. Which r and c is ours to say, as no reference has it: the pair whose cells are nearest to
squares; of two equally near pairs the one with fewer rows.

Plain numbers on the host: the encoder checks with them what the model then pools by.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch

from mirage_ds.config import CompressStrategy


class Segments(NamedTuple):
    """N segments over the patches of any number of images, as `latent_pool` takes them."""

    bounds: torch.Tensor  # [N, 2] int64: each segment's begin and end, in `order`, or without it in the patches
    order: torch.Tensor | None  # [M] int64: the patches in the order in which the segments read them


def cut_images(
    grids: Sequence[tuple[int, int]], latent_sizes: Sequence[int], strategy: CompressStrategy
) -> Segments | None:
    """The segments of a micro-batch's helper images, whose patches stand one image after the other.

    Args:
        grids: patch rows and columns of each image.
        latent_sizes: K of each image.

    Returns:
        The segments; None without any image.

    Raises:
        ValueError: see `cut_image`.
    """
    if not grids:
        return None
    cuts = [cut_image(*grid, size, strategy) for grid, size in zip(grids, latent_sizes, strict=True)]
    first_patches = _starts(rows * columns for rows, columns in grids)
    if strategy != "grid":
        return Segments(torch.cat([cut.bounds + first for cut, first in zip(cuts, first_patches, strict=True)]), None)
    orders = [cut.order for cut in cuts if cut.order is not None]
    places = _starts(map(len, orders))
    return Segments(
        torch.cat([cut.bounds + place for cut, place in zip(cuts, places, strict=True)]),
        torch.cat([order + first for order, first in zip(orders, first_patches, strict=True)]),
    )


@lru_cache(maxsize=4096)
def cut_image(rows: int, columns: int, latent_size: int, strategy: CompressStrategy) -> Segments:
    """The segments of one image of rows x columns patches. The result is shared: do not write into it.

    Raises:
        ValueError: the image cannot be cut into so many.
    """
    num_patches = rows * columns
    if not 1 <= latent_size <= num_patches:
        raise ValueError(f"the helper image has {num_patches} merged patches for {latent_size} latents")
    if strategy == "grid":
        return _cut_grid(rows, columns, latent_size)
    edges = torch.arange(latent_size + 1)
    edges = edges * (num_patches // latent_size) if strategy == "average" else edges * num_patches // latent_size
    return Segments(torch.stack([edges[:-1], edges[1:]], dim=1), None)


def grid_shape(rows: int, columns: int, latent_size: int) -> tuple[int, int]:
    """Cell rows and columns of `grid`: their product is K, and their cells are nearest to squares.

    Raises:
        ValueError: every such pair has more rows or columns than the image has.
    """
    factors = [(r, latent_size // r) for r in range(1, latent_size + 1) if latent_size % r == 0]
    fitting = [(r, c) for r, c in factors if r <= rows and c <= columns]
    if not fitting:
        raise ValueError(
            f"the helper image has {rows} x {columns} merged patches, into which no grid of {latent_size} cells fits"
        )

    def elongation(shape: tuple[int, int]) -> Fraction:
        aspect = Fraction(rows * shape[1], columns * shape[0])  # of a cell
        return max(aspect, 1 / aspect)

    return min(fitting, key=lambda shape: (elongation(shape), shape))


def _cut_grid(rows: int, columns: int, latent_size: int) -> Segments:
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
    """Where each of several runs begins when they stand one after the other."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
