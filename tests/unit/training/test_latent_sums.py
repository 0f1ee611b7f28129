"""Latent health in training, against plain averages over pairs of states; when it is taken, and what is told."""

import math
from functools import partial
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mirage_ds.batch import Batch
from mirage_ds.model.targets import LatentTargets
from mirage_ds.training import latent_sums
from mirage_ds.training.latent_sums import LatentFigures, LatentSums
from mirage_ds.zero3 import distributed

ROWS, COLUMNS, HIDDEN, SLOTS = 3, 20, 6, 3
# First column and K of each block; the last block has a latent more than there are slots. A row's second block is left
# out: a mean over rows has one state of each.
BLOCKS = [[(4, 3)], [(2, 2), (6, 3)], [(9, 4)]]
PACKED_ENDS = [8, 20, 25, 40, 60]  # samples of one row of all columns: each block is the first of its own
TARGET_ROWS = [5, 17, 33]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@pytest.fixture(autouse=True)
def two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: 2 * values)


def effective_rank(states: list[torch.Tensor]) -> float:
    """From the singular values themselves."""
    singular = np.linalg.svd(torch.stack(states).double().numpy(), compute_uv=False)
    shares = [value / singular.sum() for value in singular if value > 1e-9]
    return math.exp(-sum(share * math.log(share) for share in shares))


class MicroBatch:
    """Random states; what belongs to each slot, found block by block."""

    def __init__(self, seed: int, *, packed: bool = False) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(ROWS, COLUMNS, HIDDEN) + 0.5
        self.embeds = torch.randn(ROWS, COLUMNS, HIDDEN)
        places = [
            (row, start + k, k) for row, blocks in enumerate(BLOCKS) for start, size in blocks for k in range(size)
        ]
        self.targets = torch.randn(len(places), HIDDEN)
        self.places = places
        self.batch: Any = SimpleNamespace(
            latent_rows=torch.tensor([row * COLUMNS + column for row, column, _ in places]),
            target_rows=torch.tensor(TARGET_ROWS),
            input_ids=torch.zeros(1, ROWS * COLUMNS) if packed else torch.zeros(ROWS, COLUMNS),
            sample_ends=torch.tensor(PACKED_ENDS, dtype=torch.int32) if packed else None,
        )
        self.batch.samples_at = partial(Batch.samples_at, self.batch)
        self.packed = packed

    def add_to(self, sums: LatentSums) -> None:
        targets = LatentTargets(self.targets, self.targets, 1 / self.targets.norm(dim=1))
        sums.add(self.hidden, targets, self.embeds, self.batch)

    def state(self, number: int) -> torch.Tensor:
        row, column, _ = self.places[number]
        return self.hidden[row, column - 1]

    def at(self, slot: int) -> list[int]:
        """The latents at this place of the first block of their sample. Each block is a sample's first if packed."""
        return [
            number
            for number, (row, column, place) in enumerate(self.places)
            if place == slot and (self.packed or column - place == BLOCKS[row][0][0])
        ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("packed", [False, True])
def test_figures_are_plain_averages(packed: bool) -> None:
    """Over two micro-batches on each of two ranks that have the same ones."""
    parts = [MicroBatch(seed, packed=packed) for seed in (0, 1)]
    sums = LatentSums(SLOTS, HIDDEN, torch.device("cpu"))
    sums.active = True
    for part in parts:
        part.add_to(sums)
    figures = sums.take(targets=True)
    embedding_norm = mean([part.embeds.flatten(0, 1)[row].norm().item() for part in parts for row in TARGET_ROWS])
    for slot in range(SLOTS):
        here = [(part, number) for part in parts for number in part.at(slot)]
        states = [part.state(number) for part, number in here]
        assert figures.num_rows[slot] == 2 * len(states)
        assert figures.norm[slot] == pytest.approx(mean([state.norm().item() for state in states]) / embedding_norm)
        assert figures.target_cosine[slot] == pytest.approx(
            mean([cosine(part.state(number), part.targets[number]) for part, number in here]), abs=1e-5
        )
        assert figures.effective_rank[slot] == pytest.approx(effective_rank(states * 2), abs=1e-4)
        pairs = [cosine(one, other) for one, other in permutations(states * 2, 2)]
        assert figures.row_cosine[slot] == pytest.approx(mean(pairs), abs=1e-5)
        following = [(part, number) for part, number in here if part.places[number][2] + 1 < size_of(part, number)]
        if following:
            nexts = [cosine(part.state(number), part.state(number + 1)) for part, number in following]
            assert figures.next_cosine[slot] == pytest.approx(mean(nexts), abs=1e-5)
    empty = sums.take(targets=True)  # a step begins with nothing
    assert empty.norm == empty.effective_rank == [None] * SLOTS


@pytest.mark.parametrize("limit", [1, 5, 64])
def test_the_effective_rank_is_that_of_a_sample_of_all_ranks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Two ranks with other micro-batches share the places of the sample; each gives the first states that it makes."""
    monkeypatch.setattr(latent_sums, "MAX_SAMPLED", limit)
    parts: list[list[MicroBatch]] = [[MicroBatch(0), MicroBatch(1)], [MicroBatch(2), MicroBatch(3)]]
    ranks = []
    for rank, own in enumerate(parts):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks.append(LatentSums(SLOTS, HIDDEN, torch.device("cpu")))
        ranks[-1].active = True
        for part in own:
            part.add_to(ranks[-1])
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: sent.append(values.clone()) or values)
    ranks[1].take(targets=True)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values + sent[0])
    figures = ranks[0].take(targets=True)
    for slot in range(SLOTS):
        states = [[part.state(number) for part in own for number in part.at(slot)] for own in parts]
        sample = states[0][: (limit + 1) // 2] + states[1][: limit // 2]
        assert figures.num_rows[slot] == sum(map(len, states))
        assert figures.effective_rank[slot] == pytest.approx(effective_rank(sample), abs=1e-4)


def test_ranks_beyond_the_sample_give_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 64)
    monkeypatch.setattr(distributed, "world_size", lambda: 65)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    sums, part = LatentSums(SLOTS, HIDDEN, torch.device("cpu")), MicroBatch(0)
    sums.active = True
    part.add_to(sums)
    figures = sums.take(targets=True)
    assert figures.num_rows == [len(part.at(slot)) for slot in range(SLOTS)]
    assert any(figures.num_rows)
    assert figures.effective_rank == [None] * SLOTS


def size_of(part: MicroBatch, number: int) -> int:
    """K of a latent's block."""
    row, column, place = part.places[number]
    return dict(BLOCKS[row])[column - place]


def test_only_the_step_under_way_counts_if_it_is_reported() -> None:
    """Not those of a dry run, of a validation, or between two reported steps."""
    sums = LatentSums(SLOTS, HIDDEN, torch.device("cpu"))
    MicroBatch(0).add_to(sums)
    assert sums.take(targets=False) == LatentFigures([0] * SLOTS, *([None] * SLOTS for _ in range(5)))


def test_fed_back_states_have_no_target() -> None:
    sums = LatentSums(SLOTS, HIDDEN, torch.device("cpu"))
    sums.active = True
    empty = torch.zeros(0, HIDDEN)
    part = MicroBatch(0)
    sums.add(part.hidden, LatentTargets(empty, empty, empty[:, 0]), part.embeds, part.batch)
    figures = sums.take(targets=False)
    assert figures.target_cosine == [None] * SLOTS
    assert None not in figures.norm


@pytest.mark.parametrize(("noise", "warns"), [(0.05, True), (1.0, False)])
def test_rows_that_are_alike_are_told(noise: float, warns: bool) -> None:
    sums = LatentSums(SLOTS, HIDDEN, torch.device("cpu"))
    sums.active = True
    part = MicroBatch(0)
    part.hidden = torch.ones(HIDDEN) + noise * torch.randn_like(part.hidden)
    part.add_to(sums)
    warning = sums.take(targets=True).warning()
    assert (warning is not None) == warns
    if warning:
        assert "the latents of different rows are alike: their mean cosine is 0.9" in warning


def test_the_mean_over_slots_counts_rows() -> None:
    """As in an evaluation: two of 100 rows with a longer block do not decide."""
    others: list[list[float | None]] = [[None, None]] * 3
    few = LatentFigures([100, 2], [1.0, 1.0], [0.5, 0.99], *others)
    many = LatentFigures([2, 100], [1.0, 1.0], [0.5, 0.99], *others)
    assert few.warning() is None
    assert "their mean cosine is 0.980" in (many.warning() or "")


def test_a_state_that_is_not_finite_stays_in_its_slot() -> None:
    """And is no sign of rows that are alike."""
    sums = LatentSums(SLOTS, HIDDEN, torch.device("cpu"))
    sums.active = True
    part = MicroBatch(0)
    row, column, place = part.places[1]
    part.hidden[row, column - 1] = torch.nan
    part.add_to(sums)
    figures = sums.take(targets=True)
    for values in (figures.row_cosine, figures.effective_rank):
        assert [math.isnan(value or 0) for value in values] == [slot == place for slot in range(SLOTS)]
    assert figures.warning() is None
