"""Latent health against plain numpy, with states made by hand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from mirage_ds.data.spread import spread
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.latents.health import (
    MAX_SAMPLED,
    LatentHealth,
    effective_rank,
    health_of,
    mean_norm,
    row_cosine,
    slot_health,
)
from mirage_ds.evaluation.latents.states import States
from mirage_ds.inference.feed import Slot
from mirage_ds.model.alike import ALIKE

SIZE = 8


def states_of(folder: Path, made: Mapping[str, Mapping[tuple[int, int], torch.Tensor]]) -> States:
    """States in one file, as an evaluation writes them."""
    path = folder / "rank_0.states"
    places: dict[str, tuple[Path, dict[Slot, int]]] = {}
    written = []
    for key, slots in made.items():
        places[key] = (path, {Slot(*slot): len(written) + number for number, slot in enumerate(slots)})
        written += slots.values()
    path.write_bytes(torch.stack(written).float().numpy().tobytes())
    return States(places, SIZE)


def answer(num_blocks: int) -> Answer:
    counts = {"num_tokens": 9, "num_blocks": num_blocks, "num_latents": num_blocks, "num_replaced": 0}
    return Answer(0, "", "own", 0, "", **counts, latents_at=[0] * num_blocks, complete=True)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.sqrt(one @ one) / np.sqrt(other @ other))


def rank(states: np.ndarray) -> float:
    values = np.linalg.svd(states, compute_uv=False)
    shares = [value / values.sum() for value in values if value > 1e-12]
    return float(np.exp(-sum(share * np.log(share) for share in shares)))


def test_states_that_are_alike() -> None:
    health = slot_health(torch.ones(5, SIZE), embedding_norm=2.0)
    assert health.row_cosine == pytest.approx(1)
    assert health.effective_rank == pytest.approx(1, abs=1e-3)
    assert health.norm == pytest.approx(SIZE**0.5 / 2)


def test_orthogonal_states() -> None:
    health = slot_health(3 * torch.eye(SIZE)[:5], embedding_norm=1.0)
    assert health.row_cosine == pytest.approx(0)
    assert health.effective_rank == pytest.approx(5)


def test_opposite_states_and_one_row() -> None:
    assert row_cosine(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-1)
    assert row_cosine(torch.ones(1, 3)) is None
    assert effective_rank(torch.ones(1, 3)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_numpy(dtype: torch.dtype) -> None:
    states = (torch.randn(30, SIZE, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    plain = states.double().numpy()
    pairs = [cosine(plain[i], plain[j]) for i in range(30) for j in range(30) if i != j]
    assert row_cosine(states) == pytest.approx(np.mean(pairs))
    assert effective_rank(states) == pytest.approx(rank(plain), rel=1e-6)
    assert mean_norm(states) == pytest.approx(np.linalg.norm(plain, axis=1).mean(), rel=1e-5)


def test_many_rows_are_sampled_evenly() -> None:
    """Rows of the second half alone would have rank 1."""
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7]
    half = MAX_SAMPLED * 3
    states = torch.cat([torch.tensor([[1.0, 0]]).expand(half, 2), torch.tensor([[0.0, 1]]).expand(half, 2)])
    assert effective_rank(states) == pytest.approx(2)
    assert row_cosine(states) == pytest.approx(0.5, abs=1e-3)


def test_rows_with_other_blocks(tmp_path: Path) -> None:
    """Row a has blocks of 2 and 1 states, b one of 1, c none; targets of a alone."""
    made = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1))
    states = states_of(tmp_path, {"a": {(0, 0): made[0], (0, 1): made[1], (1, 0): made[2]}, "b": {(0, 0): made[3]}})
    target = torch.arange(float(SIZE))
    targets = {"a": [torch.stack([target, -target])], "b": []}
    health = health_of(states, [answer(2), answer(1), answer(0), answer(1)], 0.5, targets.__getitem__)
    assert health.opened == 0.75
    assert health.slots == ["0.0", "0.1", "1.0"]
    assert health.num_rows == [2, 1, 1]
    plain, goal = made.double().numpy(), target.double().numpy()
    assert health.row_cosines == [pytest.approx(cosine(plain[0], plain[3])), None, None]
    assert health.next_cosines == [pytest.approx(cosine(plain[0], plain[1])), None, None]
    assert health.target_cosines == [
        pytest.approx(cosine(plain[0], goal)),
        pytest.approx(cosine(plain[1], -goal)),
        None,
    ]
    assert health.norms == pytest.approx(
        [(np.linalg.norm(plain[0]) + np.linalg.norm(plain[3])), *(2 * np.linalg.norm(plain[[1, 2]], axis=1))]
    )
    assert health.effective_ranks == pytest.approx([rank(plain[[0, 3]]), 1, 1])
    assert health_of(states, [answer(0)], 0.5).target_cosines == [None] * 3


def test_no_block_at_all() -> None:
    health = health_of(States({}, SIZE), [answer(0)], 1.0)
    assert health == LatentHealth(opened=0.0)
    assert health.warning() is None
    assert health.as_dict()["slots"] == []


@pytest.mark.parametrize(("spread", "warns"), [(0.05, True), (2.0, False)])
def test_the_warning(spread: float, warns: bool) -> None:
    states = torch.ones(20, SIZE) + spread * torch.randn(20, SIZE, generator=torch.Generator().manual_seed(2))
    health = LatentHealth(opened=1.0)
    health.add(Slot(0, 0), slot_health(states, 1.0))
    health.add(Slot(0, 1), slot_health(states[:1], 1.0))  # one row says nothing about collapse
    warning = health.warning()
    assert (warning is not None) == warns == (row_cosine(states) > ALIKE)
    assert warning is None or ("alike" in warning and "\n" not in warning)
