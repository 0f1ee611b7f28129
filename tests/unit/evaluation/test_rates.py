"""Wilson's interval against its definition, solved by bisection; the interval of a difference against its coverage."""

from math import comb, sqrt

import pytest

from mirage_ds.evaluation.rates import difference, wilson_interval
from mirage_ds.evaluation.results import Answer
from mirage_ds.evaluation.tasks.vsp import Outcome


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


def answers(pattern: str) -> list[Answer]:
    """An answer for each character; x: solved."""
    return [
        Answer("", "", 1, 0, 0, True, "3", {"strict": Outcome(mark == "x", ""), "reference": Outcome(True, "")}, {})
        for mark in pattern
    ]


def test_a_difference_is_that_of_the_first_way_of_scoring() -> None:
    found = difference(answers("xxx.."), answers("x...x"))
    assert found.value == pytest.approx(1 / 5)
    assert found.low < found.value < found.high
    assert str(found).startswith("+20.0 points (95% interval -")
    opposite = difference(answers("x...x"), answers("xxx.."))
    assert (opposite.low, opposite.high) == pytest.approx((-found.high, -found.low))


def test_rows_where_both_agree_make_the_interval_narrow() -> None:
    """Of 100 rows 10 differ, all in one direction: above 0, where the two rates' own intervals overlap."""
    found = difference(answers("x" * 60 + "." * 40), answers("x" * 50 + "." * 50))
    assert 0 < found.low < 0.1 < found.high < 0.2
    assert wilson_interval(60, 100)[0] < wilson_interval(50, 100)[1]
    same = difference(answers("x" * 50), answers("x" * 50))
    assert same.value == 0
    assert same.low < 0 < same.high


@pytest.mark.parametrize(("gain", "loss"), [(0.3, 0.3), (0.3, 0.05), (0.05, 0.05), (0.6, 0.1)])
def test_the_interval_of_a_difference_covers_95_percent(gain: float, loss: float) -> None:
    """The exact probability, over all outcomes of 30 rows, that the interval contains the true difference.

    Where few rows differ, the interval is wider than it has to be.
    """
    total, covered = 30, 0.0
    for gained in range(total + 1):
        for lost in range(total + 1 - gained):
            same = total - gained - lost
            found = difference(
                answers("x" * gained + "." * (lost + same)), answers("." * gained + "x" * lost + "." * same)
            )
            weight = comb(total, gained) * comb(total - gained, lost)
            probability = weight * gain**gained * loss**lost * (1 - gain - loss) ** same
            covered += probability * (found.low <= gain - loss <= found.high)
    assert 0.93 < covered < 0.995
