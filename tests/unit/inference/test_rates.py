"""Wilson's interval against its definition, solved by bisection."""

from math import sqrt

import pytest

from mirage_ds.inference.rates import wilson_interval


def solve(rate: float, total: int, inside: float, outside: float) -> float:
    """The p between `inside` and `outside` that lies exactly 1.96 of its own standard errors from the rate."""
    for _ in range(200):
        middle = (inside + outside) / 2
        if abs(rate - middle) <= 1.959963984540054 * sqrt(middle * (1 - middle) / total):
            inside = middle
        else:
            outside = middle
    return inside


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (1, 1), (5, 10), (169, 200), (30, 200), (1, 1000)])
def test_the_ends_are_just_likely_enough(successes: int, total: int) -> None:
    low, high = wilson_interval(successes, total)
    rate = successes / total
    assert 0 <= low < high <= 1
    assert low == pytest.approx(solve(rate, total, rate, 0.0), abs=1e-9)
    assert high == pytest.approx(solve(rate, total, rate, 1.0), abs=1e-9)


def test_a_published_value() -> None:
    """0 of 10: 0 to 0.2775 (Wilson 1927's formula, z^2 / (n + z^2))."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
