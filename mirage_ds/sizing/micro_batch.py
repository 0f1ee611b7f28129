"""`train.micro_batch_size_per_gpu: auto`: the largest micro-batch that fits by the formulas of memory.py.

The candidates are the powers of two that divide a rank's share of the global batch: of 8 samples 1, 2, 4 and 8, of 12
samples 1, 2 and 4. A step's loss does not depend on how its global batch is cut.
"""

import socket
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.config import Config, TrainConfig
from mirage_ds.sizing.gpus import USABLE
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.model_sizes import ModelSizes
from mirage_ds.sizing.workload import Workload
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import GIB


@dataclass(frozen=True)
class Choice:
    """What `auto` takes, and why it is not more."""

    size: int
    reason: str

    def __str__(self) -> str:
        return f"micro-batch {self.size} (auto: {self.reason})"


def choose(
    sizes: ModelSizes,
    config: Config,
    deepspeed_config: dict[str, Any],
    rows: Workload,
    world_size: int,
    limit_bytes: int,
) -> Choice:
    """The largest candidate that fits; 1 if none does, as the formulas have upper bounds and the dry run has not.

    Args:
        limit_bytes: memory of a GPU that a run may use.
    """
    if config.data.packing:
        return Choice(1, "rows are packed, so data.token_budget decides what is computed at a time")
    limit = f"{limit_bytes / GIB:.1f} GiB"
    below = None
    for size in candidates(config.train, world_size):
        cut = with_micro_batch(config, size, world_size)
        peak = estimate_memory(sizes, cut, deepspeed_config, rows.largest_of(size), world_size).peak
        if peak > limit_bytes:
            if below is None:
                return Choice(size, f"by the estimate even {size} needs {peak / GIB:.1f} of {limit}")
            return Choice(below, f"{size} would need {peak / GIB:.1f} of {limit}")
        below = size
    share = config.train.samples_per_rank(world_size)
    return Choice(size, f"a rank has {share} in each step; {size} needs {peak / GIB:.1f} of {limit}")


def candidates(train: TrainConfig, world_size: int) -> list[int]:
    """The powers of two that divide a rank's share of the global batch, from 1 up.

    Raises:
        ConfigError: the global batch does not divide over the ranks.
    """
    share = train.samples_per_rank(world_size)
    return [2**power for power in range(share.bit_length()) if share % 2**power == 0]


def with_micro_batch(config: Config, size: int, world_size: int) -> Config:
    """The same run, with its global batch cut into micro-batches of `size`, one of the candidates."""
    cut = {
        "micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": None,
        "global_batch_size": config.train.samples_per_step(world_size),
    }
    return config.model_copy(update={"train": config.train.model_copy(update=cut)})


def setting_of(size: int | Literal["auto"], train: TrainConfig, world_size: int) -> str:
    """What a user sets for another micro-batch with the same global batch."""
    words = f"train.micro_batch_size_per_gpu={size}"
    if train.global_batch_size is None:
        words += f" with train.global_batch_size={train.samples_per_step(world_size)}"
    if train.gradient_accumulation_steps is not None:
        words += " with train.gradient_accumulation_steps=null"
    return words


def usable_bytes(device: torch.device) -> int:
    """Memory that a run may use on each rank, the least of all: USABLE of a GPU, or of an equal part of what is free
    on the host. The group of ranks exists; nothing of the model is loaded."""
    if device.type == "cpu":
        hosts, host = distributed.gather(socket.gethostname()), socket.gethostname()
        own = get_accelerator().available_memory() // hosts.count(host)
    else:
        own = get_accelerator().total_memory(device.index)
    (smallest,) = distributed.max_over_ranks([-int(own * USABLE)], device)
    return -smallest
