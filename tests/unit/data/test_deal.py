"""The deal: every sample once, level ranks, the same every time; on drawn lengths, how level against dealing in order.

Pure functions of the costs, so hundreds of ranks need no launch. `python -m pytest -s` prints the table of
docs/results.md.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.data.deal import Dealt, Numbers, deal, deal_in_order, deal_packed, imbalance, loads, padding

SHORTEST, LONGEST = 300, 9000  # tokens
BUDGET = 16_384


def drawn_lengths(count: int, seed: int) -> Numbers:
    """Log-normal, clipped to published lengths, which are two standard deviations around the median."""
    median, sigma = np.sqrt(SHORTEST * LONGEST), np.log(LONGEST / SHORTEST) / 4
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, count))
    return np.clip(lengths, SHORTEST, LONGEST).astype(np.int64)


@st.composite
def global_batches(draw: st.DrawFn) -> tuple[Numbers, int, int]:
    """Costs, ranks, rows of a micro-batch."""
    world_size, rows, steps = (draw(st.integers(1, largest)) for largest in (6, 4, 5))
    size = world_size * rows * steps
    return np.array(draw(st.lists(st.integers(1, 50), min_size=size, max_size=size))), world_size, rows


def places(dealt: Dealt) -> list[int]:
    return [place for ranks in dealt for micro_batch in ranks for place in micro_batch]


@given(global_batches())
def test_every_sample_is_dealt_once_into_full_micro_batches(batch: tuple[Numbers, int, int]) -> None:
    costs, world_size, rows = batch
    dealt = deal(costs, world_size, rows)
    assert sorted(places(dealt)) == list(range(len(costs)))
    assert {len(ranks) for ranks in dealt} == {world_size}
    assert {len(micro_batch) for ranks in dealt for micro_batch in ranks} == {rows}


@given(global_batches())
def test_ranks_differ_by_at_most_what_the_samples_of_the_micro_step_do(batch: tuple[Numbers, int, int]) -> None:
    costs, world_size, rows = batch
    for ranks in deal(costs, world_size, rows):
        sums = [costs[micro_batch].sum() for micro_batch in ranks]
        own = costs[places([ranks])]
        assert max(sums) - min(sums) <= max(own) - min(own)


@given(global_batches())
def test_micro_steps_do_not_overlap_in_cost(batch: tuple[Numbers, int, int]) -> None:
    """So rows of a micro-batch are alike: no row of one micro-step lies between two rows of another."""
    costs, world_size, rows = batch
    ranges = [costs[places([ranks])] for ranks in deal(costs, world_size, rows)]
    assert all(first.min() >= second.max() for first, second in pairwise(ranges))


@given(global_batches())
def test_one_micro_batch_per_step_stays_in_order(batch: tuple[Numbers, int, int]) -> None:
    """Nothing to level, so nothing moves: no rank has the dearest samples of every step."""
    costs, _, _ = batch
    assert deal(costs, len(costs), 1) == deal_in_order(len(costs), len(costs), 1)
    assert deal(costs, 1, len(costs)) == deal_in_order(len(costs), 1, len(costs))


@given(global_batches(), st.integers(0, 100))
def test_packed_rows_keep_their_budget_and_none_is_empty(batch: tuple[Numbers, int, int], room: int) -> None:
    costs, world_size, _ = batch
    tokens = (costs + 1) // 2  # dear rows are long, but cost is not length
    budget = int(tokens.max()) + room
    dealt = deal_packed(tokens, costs, world_size, budget)
    assert sorted(places(dealt)) == list(range(len(costs)))
    assert {len(ranks) for ranks in dealt} == {world_size}
    assert all(0 < tokens[row].sum() <= budget for ranks in dealt for row in ranks)
    assert len(dealt) >= -(-int(tokens.sum()) // (budget * world_size))


@given(global_batches(), st.integers(0, 100))
def test_packed_rows_are_level(batch: tuple[Numbers, int, int], room: int) -> None:
    """Where tokens are the cost, no two rows of the whole step differ by more than its dearest sample."""
    tokens, world_size, _ = batch
    dealt = deal_packed(tokens, tokens, world_size, int(tokens.max()) + room)
    sums = [tokens[row].sum() for ranks in dealt for row in ranks]
    assert max(sums) - min(sums) <= tokens.max()


def test_packed_rows_take_the_fewest_micro_steps() -> None:
    """By hand: 6 + 4 and 5 + 5 fit into two rows of 10; by cost alone, 6 + 5 would not."""
    tokens = np.array([4, 6, 5, 5])
    assert deal_packed(tokens, tokens, 2, 10) == [[[0, 1], [2, 3]]]
    assert len(deal_packed(tokens, tokens, 2, 9)) == 2


def test_a_sample_longer_than_a_packed_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"11 tokens, more than a packed row of 10"):
        deal_packed(np.array([4, 11]), np.array([4, 11]), 2, 10)


def test_the_deal_never_changes() -> None:
    """Fixed, with equal costs among them: all ranks and workers, whatever their numpy, must deal alike."""
    costs = np.array([3, 9, 3, 3, 7, 1, 9, 2, 5, 3, 3, 8])
    assert deal(costs, 2, 3) == [[[0, 1, 11], [4, 6, 8]], [[2, 7, 9], [3, 5, 10]]]
    assert deal_packed(costs, costs, 2, 20) == [[[1, 2, 10], [3, 6, 7]], [[4, 5, 8], [0, 9, 11]]]


def test_imbalance_by_hand() -> None:
    """The dearest ranks cost 6 and 3, the means are 4 and 2."""
    found = loads([[[0], [1, 2]], [[3], [4]]], np.array([6, 1, 1, 1, 3]))
    assert found.tolist() == [[6, 2], [1, 3]]
    assert imbalance(found) == pytest.approx((6 + 3) / (4 + 2))


def test_padding_by_hand() -> None:
    """Sums of 10 and 16, but the rows of 9 and 1 are two of 9: the rank whose sum is smaller computes more."""
    lengths = np.array([9, 8, 8, 1])
    dealt = deal(lengths, 2, 2)
    assert dealt == [[[0, 3], [1, 2]]]
    assert padding(dealt, lengths).tolist() == [[8, 0]]
    assert (loads(dealt, lengths) + padding(dealt, lengths)).tolist() == [[18, 16]]


DEALS: dict[str, Callable[[Numbers, int, int], Dealt]] = {
    "in order": lambda lengths, world_size, rows: deal_in_order(len(lengths), world_size, rows),
    "balanced": deal,
    "packed": lambda lengths, world_size, rows: deal_packed(lengths, lengths, world_size, BUDGET),
}


class Figures(NamedTuple):
    """Of a deal."""

    padded: float  # imbalance of what is computed
    sums: float  # imbalance of what is levelled: without padding
    padding: float  # share of all columns


def figures(world_size: int, rows: int, micro_steps: int) -> dict[str, Figures]:
    """Of each deal, medians of three global batches."""
    found: dict[str, list[Figures]] = {name: [] for name in DEALS}
    for seed in range(3):
        lengths = drawn_lengths(world_size * rows * micro_steps, seed)
        for name, how in DEALS.items():
            dealt = how(lengths, world_size, rows)
            sums = loads(dealt, lengths)
            computed = sums if name == "packed" else sums + padding(dealt, lengths)
            share = 1 - float(sums.sum() / computed.sum())
            found[name].append(Figures(imbalance(computed), imbalance(sums), share))
    medians = {name: Figures(*np.median(values, axis=0).tolist()) for name, values in found.items()}
    words = [
        f"{name} {each.padded:.3f} (sums {each.sums:.3f}, {each.padding:.0%} padding)" for name, each in medians.items()
    ]
    print(f"{world_size} ranks, {rows} x {micro_steps}: {', '.join(words)}")
    return medians


@pytest.mark.parametrize("world_size", [8, 64, 256])
def test_drawn_lengths_are_level(world_size: int) -> None:
    """At most 1.05 where a rank has 32 samples of a global batch in micro-batches of 4, or 64 one by one; packed,
    already with 4. With fewer, the longest sample alone is longer than the mean of a micro-step. The sums that are
    levelled are level with 16 in micro-batches of 4, whose padding is not."""
    shapes = {(1, 4): False, (4, 1): False, (4, 2): False, (4, 4): False, (4, 8): True, (1, 64): True}
    for (rows, micro_steps), is_level in shapes.items():
        found = figures(world_size, rows, micro_steps)
        assert found["balanced"].sums < found["in order"].sums
        assert found["packed"].padded <= 1.05
        if is_level:
            assert found["balanced"].padded <= 1.05
            assert found["in order"].padded > 1.5
        elif (rows, micro_steps) == (4, 4):
            assert found["balanced"].sums <= 1.05
