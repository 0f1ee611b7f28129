"""How level the ranks of a run will be, and how much of their micro-batches is padding: by the deal of its first steps.

Both make a step longer: all ranks wait for the dearest, and padding is computed too.
"""

from dataclasses import dataclass, replace

import numpy as np

from mirage_ds.config import Config
from mirage_ds.data.costs import Costs, measure_costs
from mirage_ds.data.index import load_index
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import MANIFEST_NAME, read_manifest
from mirage_ds.data.steps import Share, Steps
from mirage_ds.sizing.workload import image_processor

NUM_STEPS = 10  # that are dealt


@dataclass(frozen=True)
class Level:
    """Of a run's first steps. Rows that are aligned at their latents have more padding than is counted here."""

    imbalance: float = 1.0
    padding: float = 0.0  # share of all columns

    @property
    def factor(self) -> float:
        """How much longer computing takes than with level ranks and without padding."""
        return self.imbalance / (1 - self.padding)


@dataclass(frozen=True)
class FolderCosts:
    """The order and the costs of a run's samples."""

    plan: Plan
    costs: Costs

    def level(self, config: Config, world_size: int) -> Level:
        """Of a run with these samples, on this many ranks."""
        rows, accumulation = config.train.micro_batch_size, config.train.accumulation_steps(world_size)
        share = Share(0, world_size, rows, accumulation)
        budget = config.data.token_budget
        costs = self.costs
        if budget is not None:  # lengths are estimated, and a run refuses samples that are longer
            costs = replace(costs, tokens=np.minimum(costs.tokens, budget))
        steps = Steps(self.plan, costs, share, balance=config.data.balance, token_budget=budget)
        imbalances, tokens, cells = [], 0, 0
        for start in range(0, NUM_STEPS * share.global_batch_size, share.global_batch_size):
            lengths = costs.tokens[self.plan.samples(start, share.global_batch_size)]
            dealt, imbalance = steps.dealt(start)
            imbalances.append(imbalance)
            tokens += int(lengths.sum())
            cells += int(lengths.sum() if budget else rows * lengths[np.array(dealt)].max(axis=-1).sum())
        return Level(float(np.mean(imbalances)), 1 - tokens / cells)


def folder_costs(config: Config) -> FolderCosts | None:
    """Of the run's shards; None without them.

    Raises:
        DataError: the manifest or the index is damaged.
    """
    if not (config.data.shards / MANIFEST_NAME).is_file():
        return None
    shards = read_manifest(config.data.shards)
    costs = measure_costs(
        load_index(shards),
        image_processor(config).image_tokens,
        stage=config.train.stage,
        latent_size=config.model.latent_size,
        keeps_targets=config.model.cache_targets is not None,
    )
    return FolderCosts(Plan(shards.num_samples, shards.digest, config.run.seed), costs)
