"""Floating-point operations of a micro-batch, counted from the mathematics; the one owner of these formulas.

Legend: n tokens and T supervised tokens of a micro-batch, D hidden, V vocabulary.
"""

from dataclasses import dataclass

from mirage_ds.config import Config
from mirage_ds.sizing.model_sizes import ModelSizes
from mirage_ds.sizing.workload import Row


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one rank's micro-batch."""

    model: float
    """Required by the mathematics; the MFU is based on it."""
    computed: float
    """With the recomputation of activation checkpointing."""


def work(sizes: ModelSizes, config: Config, row: Row) -> Work:
    """Forward takes 2 FLOPs per weight and token, backward 4; the frozen tower has forward only.

    decoder    2 x elements of the layers x n + causal attention 2 x layers x hidden x n x columns
    head       2 x V x D x T; its logits are always recomputed
    tower      2 x elements x patches (an upper bound: the merger runs on merged patches only) and
               4 x full-attention blocks x hidden x patches^2
    """
    rows = config.train.micro_batch_size
    tokens = rows * row.tokens
    decoder = 2 * sum(sizes.layers) * tokens + 2 * sizes.num_layers * sizes.hidden * tokens * row.tokens
    head = 2 * sizes.vocab * sizes.hidden * rows * row.targets
    tower = 2 * sum(sizes.tower) * rows * row.patches
    tower += 4 * sizes.tower_full_blocks * sizes.tower_hidden * rows * row.patches**2
    tower *= 3 if config.model.train_tower else 1
    recomputed = decoder if config.model.activation_checkpointing == "full" else 0
    return Work(model=3 * (decoder + head) + tower, computed=3 * (decoder + head) + tower + recomputed + head)
