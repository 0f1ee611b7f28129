"""Which samples a rank computes in which micro-step: each global batch of the plan, cut by the deal. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from mirage_ds.data.costs import TOKEN_PATCHES, Costs, SampleCosts, SetCosts
from mirage_ds.data.deal import Dealt, Numbers, deal, deal_in_order, deal_packed, imbalance, loads, padding
from mirage_ds.data.mixture import Mixture
from mirage_ds.data.plan import Plan
from mirage_ds.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Which part of each global batch is a rank's, and from which position on."""

    rank: int
    world_size: int
    micro_batch_size: int  # per GPU
    gradient_accumulation_steps: int = 1
    start: int = 0  # samples that all ranks have consumed before: a multiple of the global batch size

    def __post_init__(self) -> None:
        if self.start % self.global_batch_size:
            raise ConfigError(
                f"the data position is {self.start} samples (in the checkpoint), but a global batch has "
                f"{self.global_batch_size}; a run can only resume between two global batches; set "
                "micro_batch_size_per_gpu or gradient_accumulation_steps so that the global batch size divides the "
                "position"
            )

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.micro_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class Step:
    """One rank's part of a step."""

    micro_batches: list[list[int]]  # positions of the samples of each; as many on every rank
    imbalance: float  # of all ranks, padding included; see deal.py


class Steps:
    """The steps of one rank: a pure function of the plan, so that it is the same in every process and after a resume.

    A sample that cannot be used is replaced only where it is read, so it changes no deal.
    """

    def __init__(
        self,
        plan: Plan | Mixture,
        costs: Costs | SampleCosts | SetCosts,
        share: Share,
        *,
        balance: bool = True,
        token_budget: int | None = None,
    ) -> None:
        """
        Args:
            balance: deal by cost; otherwise in order.
            token_budget: a micro-batch is one packed row of at most so many tokens, always dealt by cost, and the
                number of micro-steps differs from step to step; None: micro-batches of `share.micro_batch_size`.
        """
        self.plan, self.share = plan, share
        self._costs = costs
        self._balance, self._token_budget = balance, token_budget

    def at(self, start: int) -> Step:
        """The step whose global batch begins at position `start`."""
        dealt = self.deal(start)
        return Step(self._own(start, dealt), imbalance(self.loads(start, dealt)))

    def deal(self, start: int) -> Dealt:
        """What each rank gets of the global batch that begins at position `start`."""
        share = self.share
        if self._token_budget is None and not self._balance:
            return deal_in_order(share.global_batch_size, share.world_size, share.micro_batch_size)
        samples = self._costs_at(start)
        costs = samples.in_rows(share.micro_batch_size)
        if self._token_budget is not None:
            return deal_packed(samples.tokens, costs, share.world_size, self._token_budget)
        return deal(costs, share.world_size, share.micro_batch_size)

    def loads(self, start: int, dealt: Dealt) -> Numbers:
        """[M, W]: what each micro-batch of this deal costs, its padding included, in patches."""
        samples = self._costs_at(start)
        needed = loads(dealt, samples.in_rows(self.share.micro_batch_size))
        if self._token_budget is not None:
            return needed
        return needed + TOKEN_PATCHES * padding(dealt, samples.tokens)

    def _costs_at(self, start: int) -> Costs:
        """Of the global batch that begins at position `start`."""
        return self._costs.of(np.array(self.plan.samples(start, self.share.global_batch_size)))

    def _tokens(self, number: int) -> int:
        return int(self._costs.of(np.array([number])).tokens[0])

    def _own(self, start: int, dealt: Dealt) -> list[list[int]]:
        return [[start + place for place in ranks[self.share.rank]] for ranks in dealt]

    def candidates(self, position: int) -> Iterator[int]:
        """The number of the sample at a position, then of those after it that may take its place.

        In a packed row those that are not longer, of as many as an epoch has.
        """
        numbers = (self.plan.samples(later, 1)[0] for later in count(position))
        if self._token_budget is None:
            return numbers
        room = self._tokens(self.plan.samples(position, 1)[0])
        return (number for number in islice(numbers, self.plan.num_positions) if self._tokens(number) <= room)

    def micro_batches(self) -> Iterator[list[int]]:
        """Positions of the samples of each micro-batch, from the share's start on, without end."""
        for start in count(self.share.start, self.share.global_batch_size):
            yield from self._own(start, self.deal(start))
