"""The interval of a mean over rows, by the percentile bootstrap.

A resample draws as many rows as there are, with replacement. Its mean depends only on how often it draws each distinct
score, and these counts have a multinomial distribution: where scores are few, such as right and wrong, the counts are
drawn at once, so that a file of 100 000 rows costs no more than one of 100.
"""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
MAX_DRAWS = 1_000_000  # at a time: 8 MB
FEW = 100  # distinct scores; with more, drawing rows is cheaper than drawing counts


def mean_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of the rows' scores: between the percentiles of the resamples' means.

    It holds for rows drawn like these; with few rows, or few that differ from the others, it is too narrow.

    Args:
        scores: one of each row; of a paired difference, the difference of each row.
    """
    low, high = np.percentile(resampled_means(np.asarray(scores, dtype=np.float64), seed), PERCENTILES)
    return float(low), float(high)


def resampled_means(scores: np.ndarray, seed: int) -> np.ndarray:
    """The means [NUM_RESAMPLES] of resamples of the scores [rows]."""
    generator = np.random.default_rng(seed)
    rows = len(scores)
    distinct, counts = np.unique(scores, return_counts=True)
    few = len(distinct) <= FEW
    at_a_time = max(1, MAX_DRAWS // (len(distinct) if few else rows))
    means = []
    for start in range(0, NUM_RESAMPLES, at_a_time):
        number = min(at_a_time, NUM_RESAMPLES - start)
        if few:
            means.append(generator.multinomial(rows, counts / rows, size=number) @ distinct / rows)
        else:
            means.append(scores[generator.integers(rows, size=(number, rows))].mean(axis=1))
    return np.concatenate(means)
