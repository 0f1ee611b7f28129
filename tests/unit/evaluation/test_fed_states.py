"""What each feed chooses, with states made by hand: the cycle of rows, slots that a row lacks, the noise's norm."""

from collections.abc import Mapping

import pytest
import torch

from mirage_ds.evaluation.latents.fed_states import (
    FirstStates,
    FixedState,
    MeanStates,
    NoisyStates,
    OracleStates,
    ShuffledStates,
    cycle_of,
    next_rows,
)
from mirage_ds.inference.feed import Slot

FIRST, SECOND, OTHER_BLOCK = Slot(0, 0), Slot(0, 1), Slot(1, 0)
STATES = {key: torch.full((2,), float(number)) for number, key in enumerate("abcd")}


class InMemory:
    """As `States`, without files."""

    def __init__(self, made: Mapping[str, Mapping[Slot, torch.Tensor]]) -> None:
        self._made = made

    def __iter__(self):
        return iter(self._made)

    def slots(self, key: str) -> list[Slot]:
        return list(self._made.get(key, {}))

    def at(self, key: str, slot: Slot) -> torch.Tensor | None:
        return self._made.get(key, {}).get(slot)


MADE = InMemory({"b": {FIRST: STATES["b"]}, "d": {FIRST: STATES["d"], SECOND: STATES["d"]}})


def values(states: list) -> list[float | None]:
    return [None if state is None else state[0].item() for state in states]


def keys(count: int) -> list[str]:
    return [f"{number:09d}" for number in range(count)]


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_cycle_visits_all_rows(count: int) -> None:
    """No row is its own next row, and a walk from any row visits all rows."""
    following = next_rows(keys(count), seed=3)
    row, visited = "000000000", []
    for _ in range(count):
        row = following[row]
        visited.append(row)
    assert sorted(visited) == sorted(following) == keys(count)
    assert all(row != after for row, after in following.items())


def test_the_cycle_depends_on_seed_and_number_of_rows_alone() -> None:
    found = [tuple(cycle_of(keys(20), seed)) for seed in range(5)]
    assert len(set(found)) == 5
    renamed = cycle_of([f"key {key}" for key in keys(20)], 2)
    assert [key.split()[1] for key in renamed] == cycle_of(keys(20), 2)


def test_a_slot_that_a_row_lacks_is_taken_from_the_row_after_it() -> None:
    shuffled = ShuffledStates(MADE, {"a": "b", "b": "c", "c": "d", "d": "a"})
    assert values([shuffled(key, FIRST, STATES[key]) for key in "abcd"]) == [1, 3, 3, 1]
    assert values([shuffled(key, SECOND, STATES[key]) for key in "abcd"]) == [3, 3, 3, None]


def test_the_mean_is_over_the_rows_that_made_a_state() -> None:
    mean = MeanStates(MADE)
    assert values([mean(key, FIRST, STATES[key]) for key in "abcd"]) == [2] * 4
    assert values([mean(key, SECOND, STATES[key]) for key in "abcd"]) == [3] * 4
    assert mean("a", OTHER_BLOCK, STATES["a"]) is None


def test_the_fixed_state_is_never_a_row_s_own() -> None:
    """Of the first row in the cycle that made one; that row gets the next one's."""
    fixed = FixedState(MADE, ["c", "d", "a", "b"])
    for slot in (FIRST, SECOND, OTHER_BLOCK):
        assert values([fixed(key, slot, STATES[key]) for key in "abcd"]) == [3, 3, 3, 1]
    alone = FixedState(InMemory({"b": {FIRST: STATES["b"]}}), ["a", "b"])
    assert values([alone(key, FIRST, STATES[key]) for key in "ab"]) == [1, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_has_the_norm_that_was_asked_for(dtype: torch.dtype) -> None:
    own = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = NoisyStates(0.5, seed=1)("a", FIRST, own) - own.float()
    assert float(noise.norm() / own.float().norm()) == pytest.approx(0.5, rel=1e-5)
    assert abs(float(torch.cosine_similarity(noise, own.float(), dim=0))) < 0.1
    assert abs(float((noise / noise.std()).pow(4).mean()) - 3) < 0.5  # as of a Gaussian


def test_the_noise_depends_on_seed_row_and_slot_alone() -> None:
    own = torch.ones(64)
    cases = [(seed, key, slot) for seed in (1, 2) for key in "ab" for slot in (FIRST, SECOND, OTHER_BLOCK)]
    first = [NoisyStates(1.0, seed)(key, slot, own) for seed, key, slot in cases]
    again = [NoisyStates(1.0, seed)(key, slot, own) for seed, key, slot in reversed(cases)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({tuple(state.tolist()) for state in first}) == len(cases)
    larger = NoisyStates(2.0, 1)("a", FIRST, own)
    assert torch.allclose(larger - own, 2 * (first[0] - own), atol=1e-5)


def test_the_first_state_is_repeated_within_its_block() -> None:
    """Rows of a batch take turns; the next block has a first state of its own."""
    first = FirstStates()
    seen = []
    for block in (0, 1):
        for place in (0, 1, 2):
            for number, key in enumerate("ab"):
                own = torch.full((2,), 100.0 * block + 10 * number + place)
                seen.append(first(key, Slot(block, place), own))
                own.fill_(-1)  # the decoder's states may be overwritten later
    assert values(seen) == [None, None, 0, 10, 0, 10, None, None, 100, 110, 100, 110]


def test_the_oracle_keeps_the_state_where_there_is_no_target() -> None:
    asked: list[str] = []

    def targets_of(key: str) -> list[torch.Tensor]:
        asked.append(key)
        return [torch.full((1, 2), 7.0), torch.full((3, 2), 8.0)] if key == "a" else []

    oracle = OracleStates(targets_of)
    slots = [FIRST, SECOND, OTHER_BLOCK, Slot(1, 2), Slot(1, 3), Slot(2, 0)]
    assert values([oracle("a", slot, STATES["a"]) for slot in slots]) == [7, None, 8, 8, None, None]
    assert values([oracle("b", slot, STATES["b"]) for slot in slots]) == [None] * 6
    assert asked == ["a", "b"], "the helper images of a row are encoded once"


def test_further_answers_to_a_row() -> None:
    """They are called KEY/SAMPLE, and are fed what belongs to their row."""
    shuffled = ShuffledStates(MADE, {"a": "b", "b": "a"})
    assert values([shuffled("a/2", FIRST, STATES["a"])]) == [1]
    assert values([FixedState(MADE, ["b", "d"])("b/1", FIRST, STATES["b"])]) == [3]
