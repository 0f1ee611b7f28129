"""Mixing several data sets by quota: exact counts, even shares, any position, the same for every cut."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_ds.data.costs import TOKEN_PATCHES, Costs
from mirage_ds.data.mixture import Mixture, Part
from mirage_ds.data.plan import Plan, Windows
from mirage_ds.data.steps import Share, Steps

SIZES_AND_WEIGHTS = st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.25]))
SETS = st.lists(SIZES_AND_WEIGHTS, min_size=1, max_size=5)


def mixture_of(sets: list[tuple[int, float]], seed: int = 0) -> Mixture:
    """Of sets of so many samples with these weights."""
    parts = [
        Part(
            Plan(size, f"digest {number}", seed, Windows((1, size - 1), 1) if size > 1 and number % 2 else None), weight
        )
        for number, (size, weight) in enumerate(sets)
    ]
    return Mixture(parts)


def by_set(sets: list[tuple[int, float]], numbers: list[int]) -> list[tuple[int, int]]:
    """Of each sample number: its set, and its number there."""
    table = [(number, local) for number, (size, _) in enumerate(sets) for local in range(size)]
    return [table[number] for number in numbers]


def one_after_the_other(sets: list[tuple[int, float]], count: int, seed: int = 0) -> list[tuple[int, int]]:
    """The first positions, by a definition without closed form: the set whose turn it is gives its next sample."""
    mixture, taken = mixture_of(sets, seed), [0] * len(sets)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        done = [0] * len(sets)
        for _ in range(mixture.num_positions):
            # The first set that lags behind its share of what is left to it and the sets after it.
            for number in range(len(sets)):
                quotas = [each.positions for each in mixture.parts[number:]]
                place = sum(done[number:])
                if ((place + 1) * quotas[0] + sum(quotas) // 2) // sum(quotas) > done[number]:
                    break
            done[number] += 1
            found.append((number, mixture.parts[number].plan.samples(taken[number], 1)[0]))
            taken[number] += 1
    return found[:count]


@settings(max_examples=20)
@given(SETS, st.integers(0, 99))
def test_the_order_is_that_of_taking_turns(sets: list[tuple[int, float]], seed: int) -> None:
    assert by_set(sets, mixture_of(sets, seed).samples(0, 90)) == one_after_the_other(sets, 90, seed)


@settings(max_examples=40)
@given(SETS, st.integers(1, 4))
def test_each_sample_comes_as_often_as_its_weight_says(sets: list[tuple[int, float]], epochs: int) -> None:
    """After e epochs a set has had e * round(w * N) positions, and no two of its samples differ by more than one."""
    mixture = mixture_of(sets)
    assert mixture.num_positions == sum(max(1, round(weight * size)) for size, weight in sets)
    counts = Counter(by_set(sets, mixture.samples(0, epochs * mixture.num_positions)))
    for number, (size, weight) in enumerate(sets):
        own = [counts[number, local] for local in range(size)]
        assert sum(own) == epochs * max(1, round(weight * size))
        assert max(own) - min(own) <= 1


def test_half_of_a_set_is_followed_by_the_other_half() -> None:
    sets = [(20, 1.0), (10, 0.5)]
    mixture = mixture_of(sets)
    first, second = (by_set(sets, mixture.samples(start, 25)) for start in (0, 25))
    halves = [{local for number, local in each if number == 1} for each in (first, second)]
    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] | halves[1] == set(range(10))


@settings(max_examples=40)
@given(SETS, st.integers(0, 3))
def test_each_prefix_of_an_epoch_has_every_set_s_share(sets: list[tuple[int, float]], epoch: int) -> None:
    """Each split is off by at most 1/2, so the k-th set by at most k / 2; of two sets both by at most 1/2."""
    mixture = mixture_of(sets)
    total = mixture.num_positions
    numbers = np.array([number for number, _ in by_set(sets, mixture.samples(epoch * total, total))])
    for number, part in enumerate(mixture.parts):
        off = np.cumsum(numbers == number) - np.arange(1, total + 1) * part.positions / total
        assert np.abs(off).max() <= max(1, min(number + 1, len(sets) - 1)) / 2


def test_two_sets_alternate() -> None:
    sets = [(30, 1.0), (10, 1.0)]
    numbers = [number for number, _ in by_set(sets, mixture_of(sets).samples(0, 40))]
    assert numbers == [0, 0, 1, 0] * 10


@settings(max_examples=40)
@given(SETS, st.integers(0, 500), st.integers(0, 60))
def test_any_slice_is_cut_from_one_endless_sequence(sets: list[tuple[int, float]], start: int, count: int) -> None:
    assert mixture_of(sets).samples(start, count) == mixture_of(sets).samples(0, start + count)[start:]


def test_one_set_with_weight_1_is_its_own_order() -> None:
    assert mixture_of([(17, 1.0)]).samples(5, 60) == Plan(17, "digest 0", 0).samples(5, 60)


def test_the_mixture_never_changes() -> None:
    """Fixed: a run that is resumed by a later version must continue in the same order; else raise ORDER."""
    assert mixture_of([(5, 1.0), (4, 0.5), (2, 2.0)], seed=7).samples(0, 13) == [
        9,
        1,
        8,
        2,
        10,
        4,
        9,
        0,
        6,
        3,
        10,
        10,
        0,
    ]


def test_sets_as_large_as_any() -> None:
    mixture = Mixture([Part(Plan(10**9, "a", 0), 1.0), Part(Plan(10**8, "b", 0), 2.0)])
    numbers = np.array(mixture.samples(5 * mixture.num_positions - 600, 1200))
    assert (numbers < 10**9).sum() == 1000
    assert numbers.max() < 11 * 10**8
    assert len(set(numbers.tolist())) == 1200


@settings(max_examples=30)
@given(SETS, st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32, 64]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 9))
def test_every_cut_has_the_same_global_batches(
    sets: list[tuple[int, float]], world_size: int, rows: int, balance: bool, first: int
) -> None:
    """From any of them on, as a resumed run takes them."""
    size = 384
    costs = np.arange(1, 1 + sum(size for size, _ in sets), dtype=np.int64)
    share = Share(0, world_size, rows, size // world_size // rows, start=first * size)
    steps = Steps(mixture_of(sets), Costs(costs, TOKEN_PATCHES * costs), share, balance=balance)
    places = [place for ranks in steps.deal(first * size) for places in ranks for place in places]
    taken = mixture_of(sets).at(first * size + np.array(places)).tolist()
    assert sorted(taken) == sorted(mixture_of(sets).samples(0, (first + 1) * size)[first * size :])
