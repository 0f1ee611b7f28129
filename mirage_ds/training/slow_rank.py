"""Which rank is slower than the others.

Under ZeRO-3 the ranks wait for each other in every collective, so that their steps take equally long. What is compared
is what each does without the others (`OWN` in step_clock.py): waiting for its data, its tower, and its rollout where
that is one ZeRO-3 unit. A slow GPU is slow there too.
"""

import statistics
from dataclasses import dataclass

WINDOW_STEPS = 50  # over so many, differences between the ranks' samples average out
SLOWER = 0.20
NOTICEABLE = 0.01  # of the step: a tower that only gets dummy images takes less, and differs by chance


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of a window; seconds are per step."""

    rank: int
    host: str
    own_s: float
    median_s: float  # of the other ranks
    step_s: float

    @property
    def slower_pct(self) -> float:
        """How much slower than the median of the others."""
        return 100 * (self.own_s / self.median_s - 1)

    @property
    def is_slow(self) -> bool:
        excess_s = self.own_s - self.median_s
        return excess_s > SLOWER * self.median_s and excess_s > NOTICEABLE * self.step_s

    def describe(self) -> str:
        return (
            f"slow rank: {self.rank} on {self.host} takes {self.own_s:.2f} s a step for what it does alone (data, "
            f"tower, rollout as one unit), {self.slower_pct:.0f}% more than the median of the others"
        )


class Window:
    """Sums each rank's own seconds until there are enough steps."""

    def __init__(self, hosts: list[str]) -> None:
        """
        Args:
            hosts: of each rank.
        """
        self.hosts = hosts
        self.start()

    def start(self) -> None:
        self.own_s, self.steps_s, self.num_steps = [0.0] * len(self.hosts), 0.0, 0

    def add(self, own_s: list[float], steps_s: float, num_steps: int) -> Slowest | None:
        """Adds the seconds of some steps, own ones by rank; at the end of a window, its slowest rank."""
        self.own_s = [before + more for before, more in zip(self.own_s, own_s, strict=True)]
        self.steps_s += steps_s
        self.num_steps += num_steps
        if self.num_steps < WINDOW_STEPS or len(self.hosts) == 1:
            return None
        per_step = [seconds / self.num_steps for seconds in self.own_s]
        rank = per_step.index(max(per_step))
        median_s = statistics.median(per_step[:rank] + per_step[rank + 1 :])
        slowest = Slowest(rank, self.hosts[rank], per_step[rank], median_s, self.steps_s / self.num_steps)
        self.start()
        return slowest
