"""How level the ranks of a run will be, and how much of their micro-batches is padding: by the deal of its first steps.

Both make a step longer: all ranks wait for the dearest, and padding is computed too.
"""

from dataclasses import dataclass

import numpy as np

from mirage_ds.config import Config
from mirage_ds.data.costs import TOKEN_PATCHES, SampleCosts, SetCosts
from mirage_ds.data.folders import find_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.mixture import Mixture, order_of
from mirage_ds.data.steps import Share, Steps
from mirage_ds.sizing.measured import image_processor

NUM_STEPS = 10  # that are dealt


@dataclass(frozen=True)
class Level:
    """Of a run's first steps. Rows that are aligned at their latents have more padding than is counted here."""

    micro_steps: float  # of a step, on average
    imbalance: float = 1.0  # of padded micro-batches
    padding: float = 0.0  # share of all columns
    factor: float = 1.0  # how much longer computing takes than with level ranks and without padding


@dataclass(frozen=True)
class FolderCosts:
    """The order and the costs of a run's samples."""

    plan: Mixture
    costs: SetCosts

    def level(self, config: Config, world_size: int) -> Level:
        """Of a run with these samples, on this many ranks."""
        rows, accumulation = config.train.micro_batch_size, config.train.accumulation_steps(world_size)
        share = Share(0, world_size, rows, accumulation)
        budget = config.data.token_budget
        steps = Steps(self.plan, self.costs, share, balance=config.data.balance, token_budget=budget)
        size = share.global_batch_size
        starts = range(0, NUM_STEPS * size, size)
        loads = np.concatenate([steps.loads(start, steps.deal(start)) for start in starts])
        dealt = self.costs.of(np.array(self.plan.samples(0, NUM_STEPS * size)))
        waited, computed = world_size * int(loads.max(axis=1).sum()), int(loads.sum())
        needed, tokens = int(dealt.in_rows(rows).sum()), int(dealt.tokens.sum())
        cells = tokens + (computed - needed) // TOKEN_PATCHES
        return Level(len(loads) / NUM_STEPS, waited / computed, 1 - tokens / cells, waited / needed)


def without_shards(config: Config, world_size: int, tokens: int) -> Level:
    """Level ranks without padding, whose rows all have so many tokens."""
    budget = config.data.token_budget
    if budget is None:
        return Level(config.train.accumulation_steps(world_size))
    return Level(-(-config.train.samples_per_rank(world_size) // max(1, budget // tokens)))


def folder_costs(config: Config) -> FolderCosts | None:
    """Of the run's shards; None without them.

    Raises:
        DataError: the manifest or the index is damaged.
    """
    shards = find_folders(config.data)
    if shards is None:
        return None
    helpers, image_tokens = Helpers.of(config), image_processor(config).image_tokens
    costs = [
        SampleCosts(
            helpers.index(folder),
            image_tokens,
            stage=config.train.stage,
            latent_size=config.model.latent_size,
            keeps_targets=config.model.cache_targets is not None,
            most_tokens=config.data.token_budget,  # lengths are estimated
        )
        for folder in shards.folders
    ]
    return FolderCosts(order_of(config, shards), SetCosts(tuple(costs)))
