"""What the planner's formulas say of a run: the FLOPs of its batches, its memory on a GPU; and that GPU's peak rate."""

from dataclasses import dataclass
from typing import Any

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.sizing.flops import batch_load, work_of
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.model_sizes import ModelSizes, model_sizes
from mirage_ds.training import device
from mirage_ds.zero3 import distributed


@dataclass(frozen=True)
class Planned:
    """What the figures of a run are compared with."""

    config: Config
    sizes: ModelSizes
    peak_flops: float | None
    """FLOPs per second of this rank's GPU in `train.dtype`; None on a CPU, and if the GPU is not in the table."""
    peak_bytes: int | None
    """The planned peak of the largest rows; None on a CPU."""

    def flops(self, batch: Batch) -> float:
        """What the mathematics of a batch requires: forward and backward, without recomputation."""
        return work_of(self.sizes, self.config, batch_load(self.sizes, batch)).model


def plan(config: Config, deepspeed_config: dict[str, Any]) -> Planned:
    """For this rank's device."""
    sizes, gpu = model_sizes(config.model), device.find_gpu()
    peak_bytes = None
    if device.is_gpu():
        row = workload(config).largest_of(config.rows_per_micro_batch)
        peak_bytes = estimate_memory(sizes, config, deepspeed_config, row, distributed.world_size()).peak
    return Planned(config, sizes, gpu.flops[config.train.dtype] if gpu else None, peak_bytes)
