"""Columns in which each of n samples has any number of values, one sample behind the other. Needs no torch."""

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def starts(counts: npt.NDArray[Any]) -> Numbers:
    """[n]: the sum of all counts before each."""
    return np.cumsum(counts, dtype=np.int64) - counts


def sums(values: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Numbers:
    """[n]: the sums of the first counts[0] values, of the counts[1] after them, and so forth."""
    up_to = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(counts, dtype=np.int64)
    return up_to[ends] - up_to[ends - counts]


def places(first: Numbers, counts: Numbers) -> Numbers:
    """Of each of n runs of numbers, all of them: first, first + 1, ..., first + count - 1."""
    return np.repeat(first - starts(counts), counts) + np.arange(counts.sum())
