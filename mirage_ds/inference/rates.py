"""How sure a success rate is."""

from math import sqrt

Z_95 = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score: sound for few samples and for rates near 0 and 1.

    All p with (rate - p)^2 <= z^2 p (1 - p) / total: the two roots of a quadratic equation.
    """
    assert 0 <= successes <= total > 0
    rate, weight = successes / total, Z_95**2 / total
    centre = rate + weight / 2
    half = sqrt(weight * (rate * (1 - rate) + weight / 4))
    # Rounding would leave the ends of 0 of n and n of n a hair outside.
    return max(0.0, (centre - half) / (1 + weight)), min(1.0, (centre + half) / (1 + weight))
