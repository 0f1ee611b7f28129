"""Which patches of the vision tower attend to each other: those of one window, in some blocks those of one image.

Computed on the host, once per micro-batch. A cell is one merged patch: the tower merges 2 x 2 patches, which follow
each other, into one embedding. Cells are reordered so that the patches of a window follow each other, and windows of
one size too: attention then takes one call per size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

import numpy as np
import torch

from mirage_ds.patch_grid import CELL_PATCHES, MERGE_SIZE, Grid

# Images of one data set often have few sizes. A grid of 36 x 36 cells takes about 0.1 MB.
MAX_KEPT_GRIDS = 256


@dataclass(frozen=True)
class Sequences:
    """Sequences of patches that attend to each other, in groups of one length, ascending.

    cells: [C] int64, the order of the cells in which the sequences follow each other; None if they do already.
    inverse: [C] int64, the order that undoes it.
    groups: the number of sequences and the patches of each.
    ends: [sequences + 1] int32, 0 and then where each sequence ends: cumulative lengths, for flash_attention_2.
    """

    cells: torch.Tensor | None
    inverse: torch.Tensor | None
    groups: list[tuple[int, int]]
    ends: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The cells of a micro-batch's images, in the order of their windows."""

    cells: torch.Tensor  # [C] int64: cells as images, in raster order -> as windows
    inverse: torch.Tensor  # [C] int64: and back
    positions: torch.Tensor  # [P, 2] int64: row and column of each patch in its image, as windows
    windows: Sequences
    images: Sequences


def lay_out(grids: Sequence[Grid], window_cells: int, device: torch.device) -> Layout:
    """Lays out images of these grids (rows and columns of cells) in windows of window_cells squared cells."""
    starts = [0, *accumulate(rows * columns for rows, columns in grids)]
    windows = [
        start + window
        for start, grid in zip(starts, grids, strict=False)
        for window in image_windows(grid, window_cells)
    ]
    images = [np.arange(start, end) for start, end in pairwise(starts)]
    windows.sort(key=len)
    images.sort(key=len)
    cells = np.concatenate(windows)
    inverse = np.argsort(cells)
    positions = np.concatenate([patch_positions(grid) for grid in grids])[cells]
    image_cells = inverse[np.concatenate(images)]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    return Layout(
        tensor(cells),
        tensor(inverse),
        tensor(positions.reshape(-1, 2)),
        Sequences(None, None, by_length(windows), tensor(ends(windows))),
        Sequences(tensor(image_cells), tensor(np.argsort(image_cells)), by_length(images), tensor(ends(images))),
    )


def by_length(sequences: list[np.ndarray]) -> list[tuple[int, int]]:
    """Sequences of cells, shortest first -> the number of each length, and that length in patches."""
    return [(len(list(group)), cells * CELL_PATCHES) for cells, group in groupby(map(len, sequences))]


def ends(sequences: list[np.ndarray]) -> np.ndarray:
    """Sequences of cells -> [sequences + 1] int32: 0, then where each ends, in patches."""
    return CELL_PATCHES * np.cumsum([0, *map(len, sequences)], dtype=np.int32)


@lru_cache(maxsize=MAX_KEPT_GRIDS)
def image_windows(grid: Grid, window_cells: int) -> list[np.ndarray]:
    """The cells of each window of one image; those at its right and lower edge may be smaller."""
    cells = np.arange(grid[0] * grid[1]).reshape(grid)
    steps = [range(0, size, window_cells) for size in grid]
    return [
        cells[row : row + window_cells, column : column + window_cells].flatten()
        for row in steps[0]
        for column in steps[1]
    ]


@lru_cache(maxsize=MAX_KEPT_GRIDS)
def patch_positions(grid: Grid) -> np.ndarray:
    """[cells, 4, 2]: row and column of the patches of each cell of one image."""
    cells = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    inside = np.array([(row, column) for row in range(MERGE_SIZE) for column in range(MERGE_SIZE)])
    return cells * MERGE_SIZE + inside
