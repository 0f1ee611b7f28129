"""Several data sets in one order, each with its share of every epoch, in closed form. Needs no torch.

An epoch of the mixture has n_i = max(1, round(w_i * N_i)) positions of set i, of N_i samples and weight w_i. They are
spread evenly: positions are split between the first set and the rest, those of the rest between the second set and the
sets after it, and so forth. Of T positions of which n are the first set's, the first p have

    floor((p * n + floor(T / 2)) / T)

of them, as Bresenham draws a line: within 1/2 of p * n / T, so that every global batch has each set's share. This is
integer arithmetic on the position alone, so that any position's set is known at once and is the same everywhere.

A set's own stream continues from epoch to epoch: with a weight of 0.5 an epoch takes the half that the one before left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirage_ds.config import Config
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.plan import Numbers, Plan, Windows
from mirage_ds.errors import DataError

# Positions of an epoch. The product of two of them must not overflow 63 bits.
MAX_POSITIONS = 3 * 10**9


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    plan: Plan  # its own order
    weight: float  # passes over it in each epoch

    @property
    def positions(self) -> int:
        """n: its positions in each epoch."""
        return max(1, round(self.weight * self.plan.num_samples))


class Mixture:
    """The endless sequence of sample numbers of several sets, numbered one set after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """
        Raises:
            DataError: an epoch has too many positions.
        """
        self.parts = tuple(parts)
        self.num_positions = sum(part.positions for part in parts)
        if self.num_positions > MAX_POSITIONS:
            raise DataError(
                f"an epoch has {self.num_positions} samples (data.shards, with its weights); allowed: {MAX_POSITIONS}; "
                "use smaller weights"
            )

    def samples(self, start: int, count: int) -> list[int]:
        """Sample numbers at positions [start, start + count); they may cross into the next epochs."""
        numbers: list[int] = self.at(np.arange(start, start + count, dtype=np.int64)).tolist()
        return numbers

    def at(self, positions: Numbers) -> Numbers:
        """[n]: the sample numbers at positions [n]."""
        epochs, places = np.divmod(positions, self.num_positions)
        numbers = np.empty_like(positions)
        rest, left = np.arange(len(positions)), self.num_positions  # what is not the sets' before, and their positions
        first_number = 0
        for part in self.parts:
            before, is_its = _split(places, part.positions, left)
            its = rest[is_its]
            numbers[its] = first_number + part.plan.at(epochs[its] * part.positions + before[is_its])
            rest, places = rest[~is_its], (places - before)[~is_its]
            left -= part.positions
            first_number += part.plan.num_samples
        return numbers


def order_of(config: Config, shards: ShardFolders) -> Mixture:
    """The order in which a run takes the samples of its folders."""

    def plan(number: int) -> Plan:
        folder, windows = shards.folders[number], None
        if config.data.shuffle == "window":
            samples = tuple(shard.samples for shard in folder.manifest.shards)
            windows = Windows(samples, config.data.shuffle_window)
        return Plan(folder.num_samples, folder.digest, config.run.seed, windows)

    return Mixture([Part(plan(number), weight) for number, weight in enumerate(shards.weights)])


def _split(places: Numbers, num_first: int, total: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Of each place below `total`: how many of the first set's places are before it, and whether it is one itself."""
    before = (places * num_first + total // 2) // total
    after = ((places + 1) * num_first + total // 2) // total
    return before, after > before
