"""Estimates of step time and traffic from assumed efficiencies (gpus.py), never checked on a GPU.

Kernel launches, data loading, logging and saving are not included.

Legend: W ranks on N nodes of G GPUs, n tokens and T supervised tokens of a micro-batch, e bytes of an element,
D hidden, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

from launch.planner.level import Level
from mirage_ds.config import Config
from mirage_ds.model.backbone import DTYPES
from mirage_ds.sizing.flops import work
from mirage_ds.sizing.gpus import COMPUTE_EFFICIENCY, LINK_EFFICIENCY, MEMORY_EFFICIENCY, Gpu
from mirage_ds.sizing.memory import REDUCTION_BYTES, group_elements
from mirage_ds.sizing.model_sizes import ModelSizes
from mirage_ds.sizing.workload import Row
from mirage_ds.zero3.engine import choose_gather

# Bytes that AdamW reads and writes per element: DeepSpeed's copy of the gradient (4 + 4) and its use (4), the master
# weight and two moments (24), the weight (2).
UPDATE_BYTES = 38
# How often all weights of the layers are read, or gradients of that size are read or written: by each pass of one
# column in forward, and in backward to its input (once more if the layers are recomputed); by each sum of the gradients
# of two longer passes; and by the one matrix product of all passes of one column, which is added to that sum.
COLUMN_ACCESSES, SUM_ACCESSES, PRODUCT_ACCESSES = 2, 3, 2


@dataclass(frozen=True)
class Traffic:
    """Bytes into each GPU, per optimizer step."""

    gathered: float
    reduced: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step."""

    compute_s: float
    passes_s: float
    communication_s: float
    update_s: float
    step_s: float
    mfu: float
    """model FLOPs / (step time x peak rate)"""


def gathered_elements(sizes: ModelSizes, config: Config, latents: int) -> float:
    """Elements that a micro-step gathers, with so many latents that are fed back.

    rollout: all once, as it stays gathered from forward to backward by the shipped reuse distance.
    layer, in one pass: the language model twice, in forward and in backward, and a frozen tower once.
    groups, and layer in several passes: the layers twice in each pass, but that the last group is still there when
        backward begins; a single group stays. The rest as above.
    tests/distributed/test_sharding.py compares it with what a small model gathers on 2 CPU ranks.
    """
    if choose_gather(config) == "rollout":
        return sum(sizes.all)
    tower = sum(sizes.tower) * (2 if sum(sizes.trained.tower) else 1)
    group = group_elements(sizes, config)
    if not group:
        return tower + 2 * sum(sizes.language)
    layers = sum(sizes.layers)
    visits = 2 * (1 + latents) * math.ceil(layers / group)
    return tower + 2 * (sum(sizes.language) - layers) + (layers if group >= layers else (visits - 1) * group)


def traffic(
    sizes: ModelSizes,
    config: Config,
    deepspeed_config: dict[str, Any],
    row: Row,
    nodes: int,
    gpus_per_node: int,
    micro_steps: float,
) -> Traffic:
    """Per micro-step: e x gathered elements + bytes of communication_data_type x trained elements, reduced.

    A rank holds 1 / W of it; (W - 1) / W arrive over NVLink or the network. The G adapters of a node share what comes
    from other nodes, (N - 1) / N of it: 1 / G of that through each.
    """
    world_size = nodes * gpus_per_node
    elements = gathered_elements(sizes, config, row.latents)
    gathered = micro_steps * elements * DTYPES[config.train.dtype].itemsize
    reduced = micro_steps * REDUCTION_BYTES[deepspeed_config["communication_data_type"]] * sum(sizes.trained.all)
    both = gathered + reduced
    return Traffic(
        gathered=gathered * (world_size - 1) / world_size,
        reduced=reduced * (world_size - 1) / world_size,
        nvlink=both * (world_size - 1) / world_size if gpus_per_node > 1 else 0.0,
        network=both * (nodes - 1) / nodes / gpus_per_node,
    )


def step_time(
    sizes: ModelSizes,
    config: Config,
    deepspeed_config: dict[str, Any],
    row: Row,
    nodes: int,
    gpus_per_node: int,
    gpu: Gpu,
    level: Level,
) -> StepTime:
    """With `layer` and `groups`, gathering overlaps with computing: the longer one counts. A rollout is gathered first:
    their sum. (Its gather begins while the tower runs, which is not taken off.)

    compute        computed FLOPs of a rank's samples / (peak x COMPUTE_EFFICIENCY) x level.factor
    passes         what the row's passes add in stage 2: each one over a single column reads all layers' weights
                   COLUMN_ACCESSES times, once more if it is recomputed (of several rows, some are padded on the left);
                   of a rollout each longer one after the first adds its gradients, SUM_ACCESSES; see also
                   PRODUCT_ACCESSES. Longer
                   passes are counted by their FLOPs alone, as if reading the weights took no time beside them.
    communication  the slower of NVLink and the network, at LINK_EFFICIENCY
    update         UPDATE_BYTES x trained elements / W over the memory bandwidth

    Not valid with offload, where the time depends on the host.

    Raises:
        ConfigError: the global batch does not divide over the ranks.
    """
    world_size = nodes * gpus_per_node
    micro_steps = config.train.accumulation_steps(world_size)  # fewer if rows are packed, which only traffic depends on
    done = work(sizes, config, row)
    peak = gpu.flops[config.train.dtype]
    memory_bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    compute_s = micro_steps * done.computed / (peak * COMPUTE_EFFICIENCY) * level.factor
    overlaps = choose_gather(config) != "rollout"
    stored = config.train.micro_batch_size == 1
    recomputed = config.model.activation_checkpointing == "full" and not stored
    accessed = row.single_columns * (COLUMN_ACCESSES + recomputed) * sum(sizes.layers)
    added = (0 if overlaps else row.blocks * SUM_ACCESSES) + (PRODUCT_ACCESSES if row.single_columns else 0)
    accessed += added * sum(sizes.trained.layers)
    accessed *= micro_steps * DTYPES[config.train.dtype].itemsize
    passes_s = accessed / memory_bandwidth
    moved = traffic(sizes, config, deepspeed_config, row, nodes, gpus_per_node, level.micro_steps)
    communication_s = max(moved.nvlink / gpu.nvlink_bandwidth, moved.network / gpu.network_bandwidth) / LINK_EFFICIENCY
    update_s = UPDATE_BYTES * sum(sizes.trained.all) / world_size / memory_bandwidth
    busy_s = compute_s + passes_s
    step_s = (max(busy_s, communication_s) if overlaps else busy_s + communication_s) + update_s
    return StepTime(
        compute_s=compute_s,
        passes_s=passes_s,
        communication_s=communication_s,
        update_s=update_s,
        step_s=step_s,
        mfu=micro_steps * done.model / (step_s * peak),
    )
