"""Bootstrap intervals against a plain loop that draws row by row, and against all resamples of a few rows."""

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

from mirage_ds.evaluation.bootstrap import FEW, NUM_RESAMPLES, mean_interval, resampled_means

DIFFERENCES = [1.0] * 22 + [-1.0] * 7 + [0.0] * 51
HALVES = [0.0, 0.25, 0.5, 0.75, 1.0] * 12
MANY = [round(random.Random(place).gauss(0.3, 1), 6) for place in range(150)]


def slow_interval(scores: list[float], num_resamples: int) -> tuple[float, float]:
    """Draws rows with Python's own generator, sorts the means, and takes those at 2.5 % and 97.5 %."""
    generator = random.Random(5)
    means = sorted(
        sum(generator.choice(scores) for _ in range(len(scores))) / len(scores) for _ in range(num_resamples)
    )
    return means[round(0.025 * num_resamples)], means[round(0.975 * num_resamples)]


@pytest.mark.parametrize("scores", [DIFFERENCES, HALVES, MANY])
def test_as_a_plain_loop(scores: list[float]) -> None:
    """Within 5 % of the interval's width: its ends scatter by about 2 % of it between two draws."""
    low, high = slow_interval(scores, 4000)
    assert mean_interval(scores) == pytest.approx((low, high), abs=0.05 * (high - low))


@pytest.mark.parametrize("scores", [[0.0, 0.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
def test_as_all_resamples(scores: list[float]) -> None:
    """Every mean comes as often as among all n^n resamples."""
    rows = len(scores)
    every = Counter(round(sum(drawn) / rows, 9) for drawn in product(scores, repeat=rows))
    found = Counter(np.round(resampled_means(np.array(scores), 0), 9))
    assert set(found) <= set(every)
    for mean, count in every.items():
        share = count / rows**rows
        assert found[mean] / NUM_RESAMPLES == pytest.approx(share, abs=5 * (share / NUM_RESAMPLES) ** 0.5), mean


def test_rows_are_drawn_as_a_loop_draws_them() -> None:
    """With many distinct scores, from the same generator, whatever is drawn at a time."""
    scores = np.array(MANY)
    assert len(set(MANY)) > FEW
    generator = np.random.default_rng(3)
    plain = [np.mean([MANY[place] for place in generator.integers(150, size=150)]) for _ in range(NUM_RESAMPLES)]
    assert resampled_means(scores, 3) == pytest.approx(np.array(plain), abs=1e-12)


def test_the_interval_of_equal_scores_is_a_point() -> None:
    assert mean_interval([0.5] * 30) == (0.5, 0.5)


def test_the_same_scores_give_the_same_interval() -> None:
    """In any order, if they are few: a file's rows may be sorted."""
    assert mean_interval(DIFFERENCES) == mean_interval(DIFFERENCES[::-1])
    assert mean_interval(MANY) == mean_interval(MANY)
    assert mean_interval(MANY) != mean_interval(MANY, seed=1)
