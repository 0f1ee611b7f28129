"""The order of samples: a pure function of (seed, epoch, manifest digest). Needs no torch.

The training position is one integer, the number of samples consumed: position p is sample p % N of epoch p // N, and
global batch b is positions [b * G, (b + 1) * G), whatever the number of ranks, micro-batches or workers.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Plan:
    """The endless sequence of sample numbers in [0, num_samples)."""

    def __init__(self, num_samples: int, digest: str, seed: int) -> None:
        self.num_samples = num_samples
        self._digest = digest
        self._seed = seed
        # Of the last two epochs that were asked for: a global batch that lies in both is not read in order.
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def samples(self, start: int, count: int) -> list[int]:
        """Sample numbers at positions [start, start + count); they may cross into the next epochs."""
        numbers: list[int] = []
        while len(numbers) < count:
            epoch, offset = divmod(start + len(numbers), self.num_samples)
            numbers += self._order(epoch)[offset : offset + count - len(numbers)].tolist()
        return numbers

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            last = list(self._orders.items())[-1:]
            self._orders = {**dict(last), epoch: epoch_order(self.num_samples, self._digest, self._seed, epoch)}
        return self._orders[epoch]


def epoch_order(num_samples: int, digest: str, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of [0, num_samples): samples sorted by a hash of their number.

    Uses its own arithmetic, so that no change in a library's random generator can change the order of a resumed run.
    """
    key = hashlib.sha256(f"{digest}/{seed}/{epoch}".encode()).digest()[:8]
    base = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    hashes = splitmix64(base + np.arange(num_samples, dtype=np.uint64) * _GAMMA)
    # No ties: the arguments differ, and splitmix64 is a bijection.
    return np.argsort(hashes)


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), modulo 2**64, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
