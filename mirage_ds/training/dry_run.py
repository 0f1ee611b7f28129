"""The dry run of a start: forward and backward of its costliest micro-batch before its first step.

A run that lacks memory ends in its first minute instead of at the hour in which its longest samples come.
"""

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.packing import collate_packed
from mirage_ds.data.ragged import Numbers
from mirage_ds.data.stream import FoldersReader, encode_read, first_usable
from mirage_ds.errors import MemoryFullError
from mirage_ds.model.backbone import DTYPES
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import activation_bytes, estimate_memory
from mirage_ds.sizing.micro_batch import candidates, setting_of
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.savings import savings
from mirage_ds.sizing.workload import Row, Shape, Workload, aligned
from mirage_ds.training.start import Start
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import GIB, forget_gradients, future_moments

HELD = 4096  # samples: far more than a micro-batch takes, in case that some cannot be used
# What torch, its allocators, cuBLAS and NCCL say, where the type alone does not tell.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def dry_run(trainer: Trainer, config: Config, start: Start) -> None:
    """Computes the costliest micro-batch, the same on every rank, and leaves no trace of it.

    Raises:
        MemoryFullError: it does not fit, maybe on this rank alone.
        DataError: as in training, if many samples in a row cannot be used.
    """
    sizes, e = model_sizes(config.model), DTYPES[config.train.dtype].itemsize
    rows, world_size = workload(config), distributed.world_size()
    plan = estimate_memory(
        sizes, config, start.deepspeed_config, rows.largest_of(config.rows_per_micro_batch), world_size
    )

    def cost(row: Row) -> Numbers:
        return activation_bytes(sizes, config, row, e)

    if config.data.token_budget is not None:
        most = config.train.samples_per_step(world_size) - world_size + 1  # no rank is without a sample
        samples, per_token = costliest(
            rows.shapes, lambda shape: cost(shape.row()) / start.costs.of(shape.numbers).tokens
        )
        lengths = start.costs.of(np.array(samples)).tokens
        places = costliest_row((per_token * lengths).tolist(), lengths.tolist(), config.data.token_budget, most)
        numbers = [samples[place] for place in places]
        size = len(numbers)
    else:
        numbers, size = costliest_first(rows, cost, config), config.train.micro_batch_size
    batch = take(config, start, numbers, size)
    get_accelerator().reset_peak_memory_stats()
    try:
        rehearse(trainer, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryFullError(describe_lack(error, config, batch, plan.peak)) from error
    if distributed.is_main():
        print(describe_success(batch, trainer.device, plan.peak), flush=True)
    get_accelerator().reset_peak_memory_stats()


Values = npt.NDArray[Any]


def costliest(shapes: Iterable[Shape], value: Callable[[Shape], Values]) -> tuple[list[int], Values]:
    """Numbers of the samples with the highest values, the highest first, and these; no more than HELD."""
    numbers, values = np.zeros(0, np.int64), np.zeros(0)
    for shape in shapes:
        numbers, values = np.append(numbers, shape.numbers), np.append(values, value(shape))
        order = np.lexsort((numbers, -values))[:HELD]
        numbers, values = numbers[order], values[order]
    return numbers.tolist(), values


def costliest_first(rows: Workload, cost: Callable[[Row], Numbers], config: Config) -> list[int]:
    """Sample numbers by their costs. Where rows are aligned at their latent blocks, each is padded to all others, and
    those come first that make this row the costliest: for each place, the one with the largest block or the longest
    stretch there. As there may be more of them than a micro-batch has rows, those that matter least are the last."""
    by_cost, _ = costliest(rows.shapes, lambda shape: cost(shape.row()))
    if config.train.stage != "stage2" or config.train.micro_batch_size == 1:
        return by_cost
    found = longest(rows.shapes, cost)
    largest = list(found)
    least: list[int] = []
    while len(largest) > 1:
        without = {number: [each for each in largest if each != number] for number in largest}
        following = max(largest, key=lambda number: int(cost(aligned([found[each] for each in without[number]]).row())))
        largest = without[following]
        least.append(following)
    return list(dict.fromkeys([*largest, *reversed(least), *by_cost]))


def longest(shapes: Iterable[Shape], cost: Callable[[Row], Numbers]) -> dict[int, Shape]:
    """By their numbers, of each place the row with the largest block or the longest stretch, of equals the costliest:
    first of the blocks, then of the stretches before each, then of those at the end."""
    best: dict[tuple[int, int], tuple[tuple[int, int, int], Shape]] = {}
    for shape in shapes:
        count = np.size(shape.numbers)
        costs, numbers = (np.broadcast_to(values, count) for values in (cost(shape.row()), shape.numbers))
        columns = {(0, ordinal): sizes for ordinal, sizes in enumerate(shape.latent_sizes)}
        columns |= {(1, ordinal): stretch for ordinal, stretch in enumerate(shape.stretches[:-1])}
        for place, column in (columns | {(2, 0): shape.stretches[-1]}).items():
            values = np.broadcast_to(column, count)
            at = int(np.lexsort((-numbers, costs, values))[-1])
            key = (int(values[at]), int(costs[at]), -int(numbers[at]))
            if place not in best or key > best[place][0]:
                best[place] = (key, shape.at(at))
    return {-key[-1]: shape for _, (key, shape) in sorted(best.items(), key=lambda each: each[0])}


def costliest_row(costs: list[int], lengths: Sequence[int], budget: int, most: int) -> list[int]:
    """Numbers of at most `most` samples for a packed row: those with the highest cost per token that fit into it."""
    chosen: list[int] = []
    for number in sorted(range(len(costs)), key=lambda number: costs[number] / lengths[number], reverse=True):
        if lengths[number] <= budget and len(chosen) < most:
            chosen.append(number)
            budget -= lengths[number]
    return chosen


def take(config: Config, start: Start, numbers: Iterable[int], size: int) -> Batch:
    """A micro-batch of `size` of these samples, again from the first where there are too few.

    A sample that cannot be used is left for the run to meet, which may never read it; the next one takes its place.
    """
    read, following = FoldersReader(start.shards, helpers=Helpers.of(config)), cycle(numbers)
    samples = [first_usable(partial(encode_read, start.encoder, read), following, "skip") for _ in range(size)]
    if config.hides_images:  # any of them may be drawn, which takes more memory
        samples = [replace(sample, hides_images=True) for sample in samples]
    if config.data.packing:
        return collate_packed(samples)
    return collate(samples, align_latents=config.train.stage == "stage2")


def rehearse(trainer: Trainer, batch: Batch) -> None:
    """Forward and backward as in a step; afterwards gradients, counters and random state are as before.

    With memory for AdamW's moments, which a new run has from its first step on. Twice: in the first pass DeepSpeed
    records the order of the modules, from the second on it prefetches by it, which takes more memory, and gradients are
    added to those that are there.
    """
    moments = future_moments(trainer.engine)
    devices = [] if trainer.device.type == "cpu" else [trainer.device]
    on_device = batch.to(trainer.device)
    with torch.random.fork_rng(devices, device_type=trainer.device.type):
        for _ in range(2):
            trainer.forward_backward(on_device, last=False)
    forget_gradients(trainer.engine)
    del moments


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left for what was computed."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def describe_lack(error: RuntimeError, config: Config, batch: Batch, planned_bytes: int) -> str:
    """What does not fit, where, what is allowed, and what to set."""
    train, world_size = config.train, distributed.world_size()
    where = f"train.micro_batch_size_per_gpu={train.micro_batch_size}"
    smaller = [size for size in candidates(train, world_size) if size < train.micro_batch_size]
    settings = [setting_of(smaller[-1], train, world_size)] if smaller else []
    if config.data.packing:
        where, settings = f"data.token_budget={config.data.token_budget}", ["a smaller data.token_budget"]
    settings += [setting for setting, _ in savings(config)]
    settings += ["more GPUs or nodes", "smaller images (data.max_pixels)"]
    reason = (str(error).splitlines() or ["out of memory"])[0]
    return (
        f"the costliest micro-batch does not fit into memory ({where}, "
        f"rank {distributed.rank()} on {socket.gethostname()}): {reason:.160}; the run may meet as many of the "
        f"costliest samples at a time, here {batch.input_ids.shape[1]} columns, and its estimate is "
        f"{planned_bytes / GIB:.1f} GiB; use {', or '.join(settings)}"
    )


def describe_success(batch: Batch, device: torch.device, planned_bytes: int) -> str:
    """One line for the log; on a GPU with the peak and the plan."""
    columns = batch.input_ids.shape[1]
    found = f"dry run: the costliest micro-batch fits (samples: {len(batch.keys)}, columns: {columns})"
    if device.type == "cpu":
        return found
    peak, total = get_accelerator().max_memory_allocated(), get_accelerator().total_memory(device.index)
    return f"{found}: peak {peak / GIB:.1f} of {total / GIB:.1f} GiB, planned {planned_bytes / GIB:.1f}"
