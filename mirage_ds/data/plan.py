"""The order of samples: a pure function of (seed, epoch, manifest digest). Needs no torch.

The training position is one integer, the number of samples consumed: position p is place p % N of epoch p // N, and
global batch b is positions [b * G, (b + 1) * G), whatever the number of ranks, micro-batches or workers.

Which sample stands at a place is computed, not looked up: each epoch has a keyed bijection of [0, N), a Feistel network
over the next larger 4**k numbers, whose results beyond N are put through it again until they are below N (cycle
walking; less than 4 times on average). So any position of any epoch takes less than a millisecond and no memory. A
permutation that the processes of a node share would be a file of 8 bytes a sample for each epoch, which one of them has
to write and to delete while the others wait.

With `data.shuffle: window` the shards are permuted, each few that follow each other there are a window, and samples are
permuted inside their window; that takes a few numbers per shard.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ORDER = 2  # the version of the order: another one wherever the same inputs give other samples. 1 sorted hashes
# Of the network. With halves of one bit each of the 24 orders of 4 samples is within 0.1% equally likely; after 4
# rounds it would be 25%.
ROUNDS = 12
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUND_OFFSETS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GAMMA


@dataclass(frozen=True)
class Windows:
    """Shuffling in windows of shards, so that a disk is read mostly in sequence."""

    shard_samples: tuple[int, ...]  # samples of each shard, whose numbers follow each other
    width: int  # shards of a window; the last window of an epoch may have fewer


class Plan:
    """The endless sequence of sample numbers in [0, num_samples)."""

    def __init__(self, num_samples: int, digest: str, seed: int, windows: Windows | None = None) -> None:
        """
        Args:
            windows: None: all samples of an epoch are shuffled together.
        """
        self.num_samples = num_samples
        self._digest = digest
        self._seed = seed
        self._windows = windows
        # Of the last two epochs that were asked for: a global batch that lies in both is not read in order.
        self._window_orders: dict[int, _WindowOrder] = {}

    @property
    def num_positions(self) -> int:
        """Of an epoch."""
        return self.num_samples

    def samples(self, start: int, count: int) -> list[int]:
        """Sample numbers at positions [start, start + count); they may cross into the next epochs."""
        return self.at(np.arange(start, start + count, dtype=np.int64)).tolist()

    def at(self, positions: Numbers) -> Numbers:
        """[n]: the sample numbers at positions [n], which may lie in any epochs."""
        epochs, places = np.divmod(positions, self.num_samples)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            numbers[chosen] = self._in_epoch(epoch, places[chosen])
        return numbers

    def _in_epoch(self, epoch: int, places: Numbers) -> Numbers:
        if self._windows is None:
            return permute(places, self.num_samples, order_key(self._digest, self._seed, epoch))
        if epoch not in self._window_orders:
            last = list(self._window_orders.items())[-1:]
            order = _WindowOrder(self._windows, self._digest, self._seed, epoch)
            self._window_orders = {**dict(last), epoch: order}
        return self._window_orders[epoch].at(places)


class _WindowOrder:
    """One epoch's order where samples are shuffled in windows of shards."""

    def __init__(self, windows: Windows, digest: str, seed: int, epoch: int) -> None:
        samples = np.array(windows.shard_samples, dtype=np.int64)
        shards = permute(np.arange(len(samples)), len(samples), order_key(digest, seed, epoch, "shards"))
        # In the order of the epoch's shards: the number of the first sample, and the place at which the shard begins.
        self._first_numbers = (np.cumsum(samples) - samples)[shards]
        self._shard_starts = np.cumsum(samples[shards]) - samples[shards]
        self._starts = self._shard_starts[:: windows.width]  # of the windows
        self._sizes = np.diff(self._starts, append=samples.sum())
        key = order_key(digest, seed, epoch, "windows")
        self._keys = splitmix64(key + np.arange(len(self._starts), dtype=np.uint64) * _GAMMA)

    def at(self, places: Numbers) -> Numbers:
        window = np.searchsorted(self._starts, places, side="right") - 1
        starts = self._starts[window]
        shuffled = starts + permute(places - starts, self._sizes[window], self._keys[window])
        shard = np.searchsorted(self._shard_starts, shuffled, side="right") - 1
        return self._first_numbers[shard] + shuffled - self._shard_starts[shard]


def epoch_order(num_samples: int, digest: str, seed: int, epoch: int) -> Numbers:
    """The complete permutation of [0, num_samples)."""
    return permute(np.arange(num_samples), num_samples, order_key(digest, seed, epoch))


def order_key(digest: str, seed: int, epoch: int, what: str = "") -> Words:
    """[1]: the key of an epoch's bijection; `what` tells several of one epoch apart."""
    text = "/".join([digest, str(seed), str(epoch), *([what] if what else [])])
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], dtype="<u8").astype(np.uint64)


def permute(numbers: Numbers, sizes: Numbers | int, keys: Words) -> Numbers:
    """[n]: where the bijection of [0, size) with this key takes each of [n] numbers below its size.

    Uses its own arithmetic, so that no change in a library's random generator can change the order of a resumed run.

    Args:
        sizes, keys: of each number, [n], or one of all: an integer, and [1].
    """
    size = np.atleast_1d(np.asarray(sizes)).astype(np.uint64)
    values = _feistel(numbers.astype(np.uint64), _half_bits(size), keys)
    # The bijection of the 4**k numbers has cycles; each number takes the next one on its cycle that is below the size.
    while (outside := np.flatnonzero(values >= size)).size:
        its_size, its_key = (each if len(each) == 1 else each[outside] for each in (size, keys))
        values[outside] = _feistel(values[outside], _half_bits(its_size), its_key)
    return values.astype(np.int64)


def _half_bits(size: Words) -> Words:
    """k, so that 4**k is the next power of 4 that has room for [0, size); at least 1."""
    _, bits = np.frexp((size - np.uint64(1)).astype(np.float64))  # exact below 2**53
    return np.maximum((bits + 1) // 2, 1).astype(np.uint64)


def _feistel(values: Words, half_bits: Words, keys: Words) -> Words:
    """A balanced Feistel network over 2 * half_bits bits, elementwise."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for offset in _ROUND_OFFSETS:
        left, right = right, left ^ (splitmix64(splitmix64(keys + offset) + right) & mask)
    return left << half_bits | right


def splitmix64(values: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), modulo 2**64, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
