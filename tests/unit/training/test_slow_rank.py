"""Which rank is named as slow, from seconds that are given."""

import pytest

from mirage_ds.training.slow_rank import WINDOW_STEPS, Slowest, Window


def slowest(*per_step: float, step_s: float = 2.0) -> Slowest:
    """Of ranks that take so many seconds for what they do alone, in each of a window's steps."""
    window = Window([f"node{rank // 2}" for rank in range(len(per_step))])
    for _ in range(WINDOW_STEPS - 1):
        assert window.add(list(per_step), step_s, 1) is None
    found = window.add(list(per_step), step_s, 1)
    assert found is not None
    assert window.add(list(per_step), step_s, 1) is None  # a new window
    return found


def test_a_slow_rank_is_named_with_its_host() -> None:
    found = slowest(1.0, 1.1, 1.0, 1.4)
    assert found.is_slow
    assert (found.rank, found.host, found.slower_pct) == (3, "node1", pytest.approx(40))
    assert found.describe().startswith("slow rank: 3 on node1 takes 1.40 s a step for what it does alone (")
    assert found.describe().endswith(", 40% more than the median of the others")


def test_of_two_ranks_each_is_compared_with_the_other() -> None:
    assert slowest(1.3, 1.0).is_slow
    assert not slowest(1.15, 1.0).is_slow


def test_a_slow_rank_does_not_hide_behind_slower_ones() -> None:
    assert slowest(1.0, 1.0, 1.0, 1.5, 3.0).rank == 4


def test_what_cannot_be_noticed_in_a_step_is_not_said() -> None:
    """Twice as slow, for 10 ms of a step of 2 s."""
    assert not slowest(0.01, 0.02).is_slow
    assert slowest(0.01, 0.02, step_s=0.5).is_slow


def test_one_slow_step_is_no_slow_rank() -> None:
    window = Window(["a", "b"])
    window.add([5.0, 1.0], 5.0, 1)
    found = window.add([1.0 * (WINDOW_STEPS - 1)] * 2, 2.0 * (WINDOW_STEPS - 1), WINDOW_STEPS - 1)
    assert found is not None
    assert not found.is_slow


def test_one_rank_has_no_others() -> None:
    assert Window(["a"]).add([100.0], 200.0, 100) is None
