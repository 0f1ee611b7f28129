"""The interval of a mean over rows, by the percentile bootstrap.

A resample draws as many rows as there are, with replacement; its mean depends only on how often it draws each distinct
score. These counts have a multinomial distribution, so they are drawn at once: a file of 100 000 right and wrong
answers costs no more than one of 10.
"""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
MAX_COUNTS = 2_000_000  # drawn at a time: 16 MB


def mean_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of the rows' scores: between the percentiles of the resamples' means.

    It holds for rows drawn like these; with few rows, or few that differ from the others, it is too narrow.

    Args:
        scores: one of each row; of a paired difference, the difference of each row.
    """
    distinct, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    generator = np.random.default_rng(seed)
    at_a_time = max(1, MAX_COUNTS // len(distinct))
    means = np.concatenate(
        [
            generator.multinomial(len(scores), counts / len(scores), size=min(at_a_time, NUM_RESAMPLES - start))
            @ distinct
            for start in range(0, NUM_RESAMPLES, at_a_time)
        ]
    )
    low, high = np.percentile(means / len(scores), PERCENTILES)
    return float(low), float(high)
