"""Steps for tests: in order, of what comes before and after the deal; or dealt by the lengths of encoded samples."""

from collections.abc import Iterable

import numpy as np

from mirage_ds.data.costs import TOKEN_PATCHES, Costs
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.steps import Share, Steps


def in_order(share: Share, folder: ShardFolder | None = None, seed: int = 0) -> Steps:
    """Of a folder's samples, or of any."""
    plan = Plan(folder.num_samples, folder.digest, seed) if folder else Plan(100, "", seed)
    equal = np.ones(plan.num_samples, dtype=np.int64)
    return Steps(plan, Costs(equal, TOKEN_PATCHES * equal), share, balance=False)


class AsTheyCome(Plan):
    """Position p is sample p."""

    def __init__(self) -> None:
        super().__init__(1, "", 0)

    def samples(self, start: int, count: int) -> list[int]:
        return list(range(start, start + count))


def by_length(
    share: Share, samples: Iterable[EncodedSample], *, balance: bool = True, token_budget: int | None = None
) -> Steps:
    """Of these samples, one after the other."""
    tokens = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    return Steps(AsTheyCome(), Costs(tokens, TOKEN_PATCHES * tokens), share, balance=balance, token_budget=token_budget)
