"""The validation loss: over samples spread evenly over a folder of shards, the same mean as in training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from mirage_ds.batch import Batch
from mirage_ds.errors import DataError
from mirage_ds.zero3 import distributed


@dataclass
class Validation:
    """Every rank takes its share. All make the same number of forwards; those without samples of their own count 0."""

    engine: DeepSpeedEngine
    num_passes: Callable[[Batch], int | None]
    agree_on_fault: Callable[[DataError | None], bool]  # whether any rank has this fault, which ends the run
    read_batch: Callable[[list[int]], Batch]
    numbers: list[int]
    micro_batch_size: int
    device: torch.device

    def losses(self) -> dict[str, Any] | None:
        """Means over the samples: {"loss", "ce_loss", "latent_loss"}; None if one cannot be used, on any rank."""
        total = torch.zeros(3, device=self.device, dtype=torch.float64)
        self.engine.eval()
        with torch.no_grad():
            for numbers in self.shares():
                batch = self.usable_batch(numbers or self.numbers[:1])
                if batch is None:
                    return None
                losses = self.engine(batch=batch, num_passes=self.num_passes(batch))
                total += torch.stack(losses) * bool(numbers)
        self.engine.train()
        means = (distributed.sum_over_ranks(total) / len(self.numbers)).tolist()
        return dict(zip(("loss", "ce_loss", "latent_loss"), means, strict=True))

    def usable_batch(self, numbers: list[int]) -> Batch | None:
        """These samples as a batch; None on every rank if one rank cannot use its own."""
        batch: Batch | None = None
        fault: DataError | None = None
        try:
            batch = self.read_batch(numbers).to(self.device)
        except DataError as error:
            fault = error
        return None if self.agree_on_fault(fault) else batch

    def shares(self) -> Iterator[list[int]]:
        """Sample numbers of this rank's micro-batches; an empty list where only other ranks have samples left."""
        stride = distributed.world_size() * self.micro_batch_size
        for start in range(0, len(self.numbers), stride):
            own = start + distributed.rank() * self.micro_batch_size
            yield self.numbers[own : own + self.micro_batch_size]
