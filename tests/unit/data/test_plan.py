"""The order of samples: a permutation per epoch, a pure function of its inputs, the same for any number of ranks."""

import hashlib
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.index import load_index
from mirage_ds.data.mixture import order_of
from mirage_ds.data.plan import Plan, Windows, epoch_order, splitmix64
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import load_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
GAMMA = 0x9E3779B97F4A7C15
SHARDS = (3, 1, 6, 5, 5)
SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 63, 64, 65, 97, 255, 256, 257, 1021, 1023, 1024, 1025, 4099, 65537]


def chi_square(counts: npt.NDArray[np.int64]) -> float:
    """In standard deviations from its mean, of equally likely cells."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_splitmix64_gives_the_published_numbers() -> None:
    states = np.array([(1234567 + GAMMA * number) % 2**64 for number in range(1, 6)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_order_never_changes() -> None:
    """Fixed: a run that is resumed by a later version must continue in the same order; else raise ORDER."""
    assert epoch_order(12, "digest", 7, 3).tolist() == [7, 10, 6, 11, 2, 8, 1, 4, 0, 5, 9, 3]
    assert Plan(12, "digest", 7).samples(9, 6) == [5, 1, 7, 7, 5, 8]
    assert Plan(10**9, "digest", 7).samples(10**9 - 2, 4) == [511181980, 174643818, 411348454, 347345653]
    windows = Plan(20, "digest", 7, Windows(SHARDS, 2))
    assert windows.samples(0, 22) == [
        *(13, 10, 14, 7, 5, 9, 8, 12, 4, 11, 6, 16, 19, 2, 15, 0, 18, 1, 17, 3),
        *(10, 9),
    ]


def slow_order(num_samples: int, key: int) -> list[int]:
    """The bijection in Python's integers, one number at a time."""
    half = max(1, -(-(num_samples - 1).bit_length() // 2))

    def mix(value: int) -> int:
        value %= 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    def network(value: int) -> int:
        left, right = divmod(value, 2**half)
        for number in range(1, 13):
            left, right = right, left ^ mix(mix(key + number * GAMMA) + right) % 2**half
        return left * 2**half + right

    found = []
    for number in range(num_samples):
        value = network(number)
        while value >= num_samples:
            value = network(value)
        found.append(value)
    return found


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64, 100])
def test_the_bijection_is_the_one_of_plain_integers(num_samples: int) -> None:
    key = int.from_bytes(hashlib.sha256(b"d/3/4").digest()[:8], "little")
    assert epoch_order(num_samples, "d", 3, 4).tolist() == slow_order(num_samples, key)


@pytest.mark.parametrize("num_samples", SIZES)
def test_each_epoch_of_any_size_is_a_permutation(num_samples: int) -> None:
    assert sorted(epoch_order(num_samples, "d", 1, 2)) == list(range(num_samples))


@given(st.integers(1, 600), st.text(max_size=5), st.integers(0, 2**40), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(num_samples: int, digest: str, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_samples, digest, seed, epoch)) == list(range(num_samples))


def test_the_order_depends_on_seed_epoch_and_data() -> None:
    orders = [epoch_order(50, *inputs).tolist() for inputs in (("d", 0, 0), ("d", 0, 1), ("d", 1, 0), ("e", 0, 0))]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("num_samples", [3, 4])
def test_all_orders_of_few_samples_are_equally_likely(num_samples: int) -> None:
    found = Counter(tuple(epoch_order(num_samples, "d", 5, epoch).tolist()) for epoch in range(4800))
    counts = np.array([found[order] for order in permutations(range(num_samples))])
    assert counts.sum() == 4800
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("num_samples", [10, 16, 27])
def test_every_sample_stands_anywhere_equally_often(num_samples: int) -> None:
    """Over epochs and over seeds; and so does what stands one epoch later, whatever stands there now."""
    count = 100 * num_samples
    for inputs in ([(0, epoch) for epoch in range(count)], [(seed, 0) for seed in range(count)]):
        orders = np.array([epoch_order(num_samples, "d", *each) for each in inputs])
        landed = np.array([np.bincount(orders[:, place], minlength=num_samples) for place in range(num_samples)])
        assert abs(chi_square(landed)) < 4
        cells = orders[:-1, 0] * num_samples + orders[1:, 0]  # the first samples of two epochs that follow each other
        assert abs(chi_square(np.bincount(cells, minlength=num_samples**2))) < 4


def test_neighbours_do_not_stay_together() -> None:
    """The step from one place to the next is as in a random permutation: each of the N - 1 equally often (mod N)."""
    for num_samples in (101, 257, 1000):
        orders = np.array([epoch_order(num_samples, "d", seed, 0) for seed in range(200)])
        steps = np.bincount((np.diff(orders, axis=1) % num_samples).ravel(), minlength=num_samples)
        assert steps[0] == 0
        assert abs(chi_square(steps[1:])) < 4
        # What follows sample i, over all i: no pair is kept from one seed to another.
        after = np.empty_like(orders)
        np.put_along_axis(after, orders, np.roll(orders, -1, axis=1), axis=1)
        kept = (after[1:] == after[:-1]).sum()
        assert kept == pytest.approx(199 * num_samples / (num_samples - 1), abs=60)


def test_epochs_are_not_correlated() -> None:
    orders = np.array([epoch_order(4096, "d", 0, epoch) for epoch in range(12)])
    correlations = np.corrcoef(orders)[np.triu_indices(12, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(4096)


@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 60))
def test_any_slice_is_cut_from_one_endless_sequence(num_samples: int, start: int, count: int) -> None:
    endless = [
        sample
        for epoch in range((start + count) // num_samples + 1)
        for sample in epoch_order(num_samples, "d", 5, epoch).tolist()
    ]
    assert Plan(num_samples, "d", 5).samples(start, count) == endless[start : start + count]


@pytest.mark.parametrize("windows", [None, Windows((3, 4), 1)])
def test_going_back_gives_the_same(windows: Windows | None) -> None:
    plan = Plan(7, "d", 0, windows)
    forward = [plan.samples(position, 1) for position in range(28)]
    assert [plan.samples(position, 1) for position in reversed(range(28))] == forward[::-1]
    assert plan.samples(0, 28) == [sample for each in forward for sample in each]


def windows_of(order: list[int], shard_samples: list[int], width: int) -> list[set[int]]:
    """The shards of each window, by where the windows of an epoch must end if they are read one after the other."""
    shard_of = np.repeat(np.arange(len(shard_samples)), shard_samples)
    found, place = [], 0
    while place < len(order):
        shards: set[int] = set()
        size = 0
        while place + size < len(order):
            # A window ends where all samples of its shards were read, and it has all shards that it may have.
            shards.add(int(shard_of[order[place + size]]))
            size += 1
            left = sum(shard_samples[shard] for shard in shards) - size
            if not left and (len(shards) == width or place + size == len(order)):
                break
        found.append(shards)
        place += size
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 14), st.integers(0, 99))
def test_a_window_reads_only_its_shards(shard_samples: list[int], width: int, seed: int) -> None:
    num_samples = sum(shard_samples)
    plan = Plan(num_samples, "d", seed, Windows(tuple(shard_samples), width))
    for epoch in (0, 1):
        order = plan.samples(epoch * num_samples, num_samples)
        assert sorted(order) == list(range(num_samples))
        windows = windows_of(order, shard_samples, width)
        assert [len(shards) for shards in windows[:-1]] == [width] * (len(windows) - 1)
        assert sum(map(len, windows)) == len(shard_samples)


def test_windows_and_samples_inside_them_are_shuffled_evenly() -> None:
    """Shards of one size: every sample is the first of an epoch equally often, and follows its shard's first sample
    as often as any other of its window."""
    plan = Plan(24, "d", 1, Windows((4,) * 6, 2))
    orders = np.array([plan.samples(24 * epoch, 24) for epoch in range(1920)])
    for place in (0, 11, 23):
        assert abs(chi_square(np.bincount(orders[:, place], minlength=24))) < 4
    partners = orders[:, 1][orders[:, 0] == 0]
    same_shard = np.isin(partners, [1, 2, 3]).mean()
    assert same_shard == pytest.approx(3 / 7, abs=0.15)


def test_windows_wider_than_the_folder_shuffle_everything_together() -> None:
    plan = Plan(20, "d", 1, Windows(SHARDS, 99))
    first = np.bincount([plan.samples(20 * epoch, 1)[0] for epoch in range(1000)], minlength=20)
    assert abs(chi_square(first)) < 4


def test_a_window_that_nothing_uses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shuffle_window is 4, but .*data\.shuffle=full.*set that, or"):
        load_config(RECIPE, ["data.shuffle_window=4"])


def test_a_window_of_real_shards(shards: ShardFolder) -> None:
    """10 samples in shards of 4, 4 and 2, one shard at a time."""
    config = load_config(RECIPE, ["data.shuffle=window", "data.shuffle_window=1"])
    index = load_index(shards)
    read = [index[number].shard for number in order_of(config, ShardFolders((shards,), (1.0,))).samples(0, 10)]
    runs = [shard for place, shard in enumerate(read) if place == 0 or read[place - 1] != shard]
    assert sorted(runs) == [0, 1, 2]
