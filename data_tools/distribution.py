"""The distribution of whole numbers: quantiles, and a histogram of few bars."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_BARS = 10
LONG_TAIL = 20  # times the median: bars of equal width would put almost everything into the first


@dataclass(frozen=True)
class Bar:
    """How many values lie in first, ..., last."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Distribution:
    """Of at least one value."""

    count: int
    total: int
    mean: float
    min: int
    quantiles: dict[str, int]  # "50%": the median; each is one of the values
    max: int
    histogram: list[Bar]


def distribution(values: npt.NDArray[np.integer]) -> Distribution | None:
    """The distribution of values that are at least 0; None without any."""
    if not len(values):
        return None
    values = np.sort(values)
    # The smallest value that at least this share does not exceed.
    found = [values[math.ceil(share * len(values)) - 1] for share in QUANTILES]
    return Distribution(
        count=len(values),
        total=int(values.sum(dtype=np.int64)),
        mean=float(values.mean()),
        min=int(values[0]),
        quantiles={f"{share:.0%}": int(value) for share, value in zip(QUANTILES, found, strict=True)},
        max=int(values[-1]),
        histogram=_histogram(values, median=int(found[QUANTILES.index(0.5)])),
    )


def _histogram(values: npt.NDArray[np.integer], median: int) -> list[Bar]:
    """A bar for each value where they are few; else bars of equal width or, with a long tail, each twice as wide.

    Args:
        values: sorted.
    """
    low, high = int(values[0]), int(values[-1])
    if high - low < MAX_BARS:
        starts = list(range(low, high + 1))
    elif high > LONG_TAIL * max(median, 1):
        starts = [low, *(2**power for power in range(high.bit_length()) if 2**power > low)]
    else:
        starts = list(range(low, high + 1, -(-(high - low + 1) // MAX_BARS)))
    ends = [*starts[1:], high + 1]
    counts = np.diff(np.searchsorted(values, [*starts, high + 1])).tolist()
    return [Bar(start, end - 1, count) for start, end, count in zip(starts, ends, counts, strict=True)]
