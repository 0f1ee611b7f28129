"""The order of samples: a permutation per epoch, a pure function of its inputs, the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.data.plan import Plan, epoch_order, splitmix64

GAMMA = 0x9E3779B97F4A7C15


def test_splitmix64_gives_the_published_numbers() -> None:
    states = np.array([(1234567 + GAMMA * number) % 2**64 for number in range(1, 6)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_order_never_changes() -> None:
    """Fixed: a run that is resumed by a later version must continue in the same order."""
    assert epoch_order(12, "digest", 7, 3).tolist() == [7, 10, 8, 3, 9, 2, 11, 0, 5, 1, 4, 6]


@given(st.integers(1, 200), st.text(max_size=5), st.integers(0, 2**40), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(num_samples: int, digest: str, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_samples, digest, seed, epoch)) == list(range(num_samples))


def test_the_order_depends_on_seed_epoch_and_data() -> None:
    orders = [epoch_order(50, *inputs).tolist() for inputs in (("d", 0, 0), ("d", 0, 1), ("d", 1, 0), ("e", 0, 0))]
    assert len({tuple(order) for order in orders}) == 4


def test_first_samples_of_the_epochs_are_spread_evenly() -> None:
    first = [epoch_order(4, "d", 0, epoch)[0] for epoch in range(4000)]
    assert np.bincount(first).tolist() == pytest.approx([1000] * 4, rel=0.1)


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 100))
def test_any_slice_is_cut_from_one_endless_sequence(num_samples: int, start: int, count: int) -> None:
    endless = [sample for epoch in range(201) for sample in epoch_order(num_samples, "d", 5, epoch).tolist()]
    assert Plan(num_samples, "d", 5).samples(start, count) == endless[start : start + count]


def test_going_back_gives_the_same() -> None:
    plan = Plan(7, "d", 0)
    forward = [plan.samples(position, 1) for position in range(21)]
    assert [plan.samples(position, 1) for position in reversed(range(21))] == forward[::-1]
