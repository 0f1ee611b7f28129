"""Floating-point operations of a micro-batch, counted from the mathematics; the one owner of these formulas.

The planner counts them for its mean row, the trainer for its batches.
"""

from dataclasses import dataclass

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.model.losses import LOGIT_BLOCK_ELEMENTS
from mirage_ds.patch_grid import CELL_PATCHES, MERGE_SIZE, Grid
from mirage_ds.sizing.model_sizes import ModelSizes
from mirage_ds.sizing.workload import Row


@dataclass(frozen=True)
class Load:
    """What decides the operations of one rank's micro-batch."""

    tokens: int  # of all rows, without padding
    token_pairs: int  # a token and one that it attends to: n (n + 1) / 2 of a sample of n tokens
    targets: int  # supervised tokens
    patches: int
    image_pairs: int  # two patches of one image
    window_pairs: int  # two patches of one window


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one rank's micro-batch."""

    model: float
    """Required by the mathematics; the MFU is based on it."""
    computed: float
    """With the recomputation of activation checkpointing."""


def work(sizes: ModelSizes, config: Config, row: Row) -> Work:
    """Of a micro-batch of such rows.

    An upper bound for the tower's attention, at most a few percent of it all: as if a row's patches were one image,
    and every window complete.
    """
    rows = config.train.micro_batch_size
    load = Load(
        tokens=rows * row.tokens,
        token_pairs=rows * row.tokens * (row.tokens + 1) // 2,
        targets=rows * row.targets,
        patches=rows * row.patches,
        image_pairs=rows * row.patches**2,
        window_pairs=rows * row.patches * sizes.tower_window**2,
    )
    return work_of(sizes, config, load)


def batch_load(sizes: ModelSizes, batch: Batch) -> Load:
    """Of a batch, from its numbers on the host."""
    window_cells = sizes.tower_window // MERGE_SIZE
    return Load(
        tokens=batch.num_tokens,
        token_pairs=sum(tokens * (tokens + 1) // 2 for tokens in batch.sample_tokens),
        targets=len(batch.target_rows),
        patches=len(batch.pixel_values),
        image_pairs=sum((CELL_PATCHES * rows * columns) ** 2 for rows, columns in batch.image_grids),
        window_pairs=sum(window_pairs(grid, window_cells) for grid in batch.image_grids),
    )


def window_pairs(grid: Grid, window_cells: int) -> int:
    """Pairs of patches within the windows of one image.

    A window of r x c cells has (CELL_PATCHES r c)^2 of them; the sum over all windows is a product of two sums, over
    the heights and the widths of windows.
    """
    heights, widths = (size // window_cells * window_cells**2 + (size % window_cells) ** 2 for size in grid)
    return CELL_PATCHES**2 * heights * widths


def work_of(sizes: ModelSizes, config: Config, load: Load) -> Work:
    """Forward takes 2 FLOPs per element of a matrix and token, backward 4: 2 to the input, 2 to the matrix, which a
    frozen one has not. The frozen tower has forward only, and a frozen part below a trained merger.

    decoder    2 x matrices of the layers x tokens + 4 x layers x D x token pairs
    head       2 x V x D x supervised tokens; its logits are recomputed, those of the last block excepted
    tower      2 x matrices x patches + 2 x matrices of the merger x merged patches
               + 4 x tower's D x (blocks with full attention x image pairs + other blocks x window pairs)

    Norms, activations, the rotation of positions and the cross-entropy are not counted.
    """
    decoder = 2 * sizes.layer_matrices * load.tokens + 4 * sizes.num_layers * sizes.hidden * load.token_pairs
    head = 2 * sizes.vocab * sizes.hidden * load.targets
    window_blocks = sizes.tower_blocks - sizes.tower_full_blocks
    tower = 2 * sizes.tower_matrices * load.patches + 2 * sizes.merger_matrices * load.patches // CELL_PATCHES
    tower += 4 * sizes.tower_hidden * (sizes.tower_full_blocks * load.image_pairs + window_blocks * load.window_pairs)
    merger = 2 * load.patches // CELL_PATCHES
    if config.model.train_tower:
        tower *= 3
        tower -= 2 * (sizes.tower_matrices - sizes.trained_tower_matrices) * load.patches
        tower -= merger * (sizes.merger_matrices - sizes.trained_merger_matrices)
    elif config.model.train_merger:
        tower += merger * (sizes.merger_matrices + sizes.trained_merger_matrices)
    # Recomputing a layer stops before its last product, whose output backward does not need.
    last = 2 * sizes.num_layers * sizes.intermediate * sizes.hidden * load.tokens
    recomputed = decoder - last if config.model.activation_checkpointing == "full" else 0
    block = max(1, LOGIT_BLOCK_ELEMENTS // sizes.vocab)
    recomputed += 2 * sizes.vocab * sizes.hidden * (max(0, load.targets - 1) // block * block)
    frozen = 2 * (sizes.layer_matrices - sizes.trained_layer_matrices) * load.tokens
    frozen += 0 if sizes.trained_head_matrix else head
    model = 3 * (decoder + head) - frozen + tower
    return Work(model=model, computed=model + recomputed)
