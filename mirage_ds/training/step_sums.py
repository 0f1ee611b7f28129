"""One optimizer step as one rank sees it, and what all ranks report of some steps together."""

from dataclasses import astuple, dataclass, field

import torch

from mirage_ds.training import device
from mirage_ds.training.step_clock import OWN, PARTS, StepTimes
from mirage_ds.zero3 import distributed


@dataclass
class StepSums:
    """One optimizer step as one rank sees it; tensors and spans of time stay on the device.

    `losses` [3] are sums over this rank's samples: loss, ce_loss, latent_loss.
    """

    step: int
    position: int
    losses: torch.Tensor
    num_grounded_samples: int
    num_tokens: int
    num_cells: int  # tokens and padding
    lr: float
    grad_norm: torch.Tensor | float
    skipped_steps: int
    started_s: float
    times: StepTimes = field(default_factory=StepTimes)
    flops: float = 0.0  # what the mathematics requires
    is_skipped: bool = False  # changed no weight
    num_faults: int = 0  # samples that could not be used
    imbalance: float = 1.0  # of the ranks, by the deal; the same on all of them
    sets: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3))  # see SetLosses

    def numbers(self) -> list[float]:
        """What is summed over the ranks beside losses and seconds, in the order of Totals."""
        return [self.num_grounded_samples, self.num_tokens, self.num_cells, self.num_faults, self.flops]


@dataclass
class Totals:
    """Sums of one step over the ranks."""

    seconds: dict[str, float]  # by part, see step_clock.py
    sets: list[list[float]]  # of each data set: text loss, latent loss, samples
    loss: float
    ce_loss: float
    latent_loss: float
    grounded_samples: float
    tokens: float
    cells: float
    faults: float
    flops: float


@dataclass
class RankFigures:
    """What one rank reports of itself."""

    own_s: float  # spent in what it did without the other ranks
    allocated_bytes: float  # the most so far
    reserved_bytes: float


def sum_over_ranks(steps: list[StepSums], first_step: int) -> tuple[list[Totals], list[RankFigures]]:
    """The totals of these steps, and each rank's figures, in one all-reduce.

    Args:
        first_step: of this start; it is slow, and not counted in `own_s`.
    """
    seconds = [sums.times.seconds() for sums in steps]
    own_s = sum(each[part] for sums, each in zip(steps, seconds, strict=True) if sums.step > first_step for part in OWN)
    losses = torch.stack([sums.losses for sums in steps]).double()
    numbers = [[*sums.numbers(), *(each[part] for part in PARTS)] for sums, each in zip(steps, seconds, strict=True)]
    sets = torch.stack([sums.sets for sums in steps]).to(losses)
    step_rows = torch.cat([sets.flatten(1), losses, losses.new_tensor(numbers)], dim=1)
    # A row for each rank, in which only that rank has numbers: the sum is the table of all.
    figures = losses.new_tensor(astuple(RankFigures(own_s, *device.peak_bytes())))
    rank_rows = step_rows.new_zeros(distributed.world_size(), step_rows.shape[1])
    rank_rows[distributed.rank(), : len(figures)] = figures
    rows = distributed.sum_over_ranks(torch.cat([step_rows, rank_rows])).tolist()
    width, first = len(PARTS), sets[0].numel()
    totals = [
        Totals(
            dict(zip(PARTS, row[-width:], strict=True)),
            [row[start : start + 3] for start in range(0, first, 3)],
            *row[first:-width],
        )
        for row in rows[: len(steps)]
    ]
    return totals, [RankFigures(*row[: len(figures)]) for row in rows[len(steps) :]]
