"""The deal: who computes which sample of a global batch in which micro-step, so that the ranks are level.

All ranks wait for each other in every micro-step, so each takes as long as its dearest rank. What is dealt are places:
numbers of samples within their global batch. The deal is a pure function of the samples' costs, in integers, so that it
is the same on every rank, in every data worker and after a resume. A step's loss does not depend on it. Needs no torch.

Legend: G samples of a global batch, W ranks, M micro-steps, R rows of a micro-batch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Dealt = list[list[list[int]]]
"""[M][W]: the places of each rank's micro-batch, ascending."""


def deal_in_order(num_samples: int, world_size: int, rows: int) -> Dealt:
    """G places as they come: R to the first rank, R to the second, and so forth; then the next micro-step."""
    dealt: Dealt = np.arange(num_samples).reshape(-1, world_size, rows).tolist()
    return dealt


def deal(costs: Numbers, world_size: int, rows: int) -> Dealt:
    """Deals samples to micro-batches of R rows.

    Sorted by cost, each micro-step takes W * R neighbours, so that rows of a micro-batch are alike. Within it they are
    given out in R rounds of W samples, each time the dearest to the rank that has least. So the sums of two ranks never
    differ by more than the dearest and the cheapest sample of the micro-step differ: where one rank has more, it gets
    less. Only sums are levelled: a micro-batch of rows that are padded to its longest costs more, see `padding`.

    Args:
        costs: [G], G a multiple of W * R.
    """
    blocks = np.argsort(-costs, kind="stable").reshape(-1, rows, world_size)
    dealt = np.empty((len(blocks), world_size, rows), dtype=np.int64)
    total = np.zeros(world_size, dtype=np.int64)  # of the step: decides between ranks that are equal in a micro-step
    for block, micro_batches in zip(blocks, dealt, strict=True):
        own = np.zeros(world_size, dtype=np.int64)
        for number, places in enumerate(block):
            ranks = np.lexsort((total, own))
            micro_batches[ranks, number] = places
            own[ranks] += costs[places]
            total[ranks] += costs[places]
    dealt.sort(axis=2)
    return _without_favour(dealt.tolist())


def deal_packed(tokens: Numbers, costs: Numbers, world_size: int, budget: int) -> Dealt:
    """Deals samples to packed rows of at most `budget` tokens, one for each rank in each micro-step.

    M is the smallest number for which this succeeds: the dearest sample first, each into the row that costs least of
    those with room. M = G / W, a sample per row, always does. No row is empty, as no sample is free.

    Args:
        tokens, costs: [G], all above 0; G a multiple of W.

    Raises:
        ValueError: a sample has more tokens than the budget.
    """
    if tokens.max() > budget:
        raise ValueError(f"a sample has {tokens.max()} tokens, more than a packed row of {budget}")
    fewest = -(-int(tokens.sum()) // (budget * world_size))
    order = np.argsort(-costs, kind="stable").tolist()
    tries = range(fewest, len(costs) // world_size + 1)
    packings = (_pack(tokens, costs, order, steps * world_size, budget) for steps in tries)
    rows = next(rows for rows in packings if rows is not None)
    row_costs = np.array([costs[places].sum() for places in rows])
    dealt = deal(row_costs, world_size, 1)
    return _without_favour([[sorted(rows[row]) for (row,) in ranks] for ranks in dealt])


def _pack(tokens: Numbers, costs: Numbers, order: Sequence[int], num_rows: int, budget: int) -> list[list[int]] | None:
    """The places of each row; None if a sample finds no room."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    used, spent = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.int64)
    no_room = np.iinfo(np.int64).max
    for place in order:
        row = int(np.where(used + tokens[place] <= budget, spent, no_room).argmin())
        if used[row] + tokens[place] > budget:
            return None
        rows[row].append(place)
        used[row] += tokens[place]
        spent[row] += costs[place]
    return rows


def _without_favour(dealt: Dealt) -> Dealt:
    """Numbers the ranks by the places of their first micro-batches, which are in no order of cost.

    Else rank 0 would have the dearest samples of every step, and be reported as the slowest machine.
    """
    ranks = sorted(range(len(dealt[0])), key=lambda rank: dealt[0][rank])
    return [[micro_step[rank] for rank in ranks] for micro_step in dealt]


def loads(dealt: Dealt, costs: Numbers) -> Numbers:
    """[M, W]: the sum of the costs of each micro-batch."""
    cost = costs.tolist()
    return np.array([[sum(cost[place] for place in places) for places in ranks] for ranks in dealt], dtype=np.int64)


def padding(dealt: Dealt, tokens: Numbers) -> Numbers:
    """[M, W]: the padding of each micro-batch of R rows that are as wide as its longest, in tokens."""
    widths = tokens[np.array(dealt)]
    return (widths.max(axis=2, keepdims=True) - widths).sum(axis=2)


def imbalance(loads: Numbers) -> float:
    """The sum over micro-steps of the dearest rank's load, over the sum of the ranks' means; 1: all ranks are level.

    Args:
        loads: [M, W].
    """
    return float(loads.max(axis=1).sum() / loads.mean(axis=1).sum())
