"""Latent health: whether the states at the latents say something about their row, slot by slot.

A slot is a latent's place in an answer. With the states s_1 .. s_n in R^D that n rows made at one slot, in float64:

    norm             mean of ||s_i|| / mean of ||e_v|| over the embeddings e_v: how far an input is from all others
    row cosine       mean of cos(s_i, s_j) over all pairs i != j = (||u_1 + .. + u_n||^2 - n) / (n (n - 1)),
                     u_i = s_i / ||s_i||; 1: the slot says the same whatever the question
    next cosine      mean of cos(s_i, the state of the same row at the next slot of the block)
    effective rank   the number of directions in which the s_i lie, from 1 (alike) to n: see model/effective_rank.py
    target cosine    mean of cos(s_i, latent target of the row), where targets are known

The effective rank and the target cosine take at most MAX_SAMPLED rows, evenly spaced over the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from mirage_ds.data.spread import spread
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.latents.fed_states import target_at
from mirage_ds.evaluation.latents.states import States
from mirage_ds.inference.feed import Slot
from mirage_ds.model.alike import warn_if_alike
from mirage_ds.model.effective_rank import effective_rank as effective_rank_of

MAX_SAMPLED = 1024  # the Gram matrix of so many rows takes 8 MiB


@dataclass(frozen=True)
class SlotHealth:
    """The numbers of one slot; None where there is nothing to average."""

    num_rows: int  # n
    norm: float
    row_cosine: float | None
    effective_rank: float
    next_cosine: float | None = None
    target_cosine: float | None = None


@dataclass
class LatentHealth:
    """The health of all slots; lists are by slot, in the order of `slots`."""

    opened: float  # share of the answers that open a block
    slots: list[str] = field(default_factory=list)  # BLOCK.PLACE, from 0
    num_rows: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    row_cosines: list[float | None] = field(default_factory=list)
    next_cosines: list[float | None] = field(default_factory=list)
    effective_ranks: list[float] = field(default_factory=list)
    target_cosines: list[float | None] = field(default_factory=list)

    def add(self, slot: Slot, health: SlotHealth) -> None:
        self.slots.append(f"{slot.block}.{slot.place}")
        self.num_rows.append(health.num_rows)
        self.norms.append(health.norm)
        self.row_cosines.append(health.row_cosine)
        self.next_cosines.append(health.next_cosine)
        self.effective_ranks.append(health.effective_rank)
        self.target_cosines.append(health.target_cosine)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def row_cosine(self) -> float | None:
        """The mean row cosine over the slots, each by its number of rows; a slot of one row has none."""
        return self._mean_by_rows(self.row_cosines)

    def effective_rank(self) -> float | None:
        """The mean effective rank over the same slots: one row has a rank of 1, whatever its state."""
        pairs = zip(self.effective_ranks, self.num_rows, strict=True)
        return self._mean_by_rows([rank if count > 1 else None for rank, count in pairs])

    def _mean_by_rows(self, values: Sequence[float | None]) -> float | None:
        known = [(value, count) for value, count in zip(values, self.num_rows, strict=True) if value is not None]
        if not known:
            return None
        return sum(value * count for value, count in known) / sum(count for _, count in known)

    def warning(self) -> str | None:
        """One line if the states of different rows are alike; else None."""
        return warn_if_alike(self.row_cosine())


def health_of(
    states: States,
    answers: Sequence[Answer],
    embedding_norm: float,
    targets_of: Callable[[str], list[torch.Tensor]] | None = None,
) -> LatentHealth:
    """The health of the states that rows made in the arm `own`. The states of one slot are in memory at a time.

    Args:
        answers: those of the arm `own`, at least one.
        embedding_norm: see `mean_norm`.
        targets_of: the latent targets [K, D] of each helper image of a row, by its key; None: not at hand.
    """
    health = LatentHealth(sum(answer.num_blocks > 0 for answer in answers) / len(answers))
    target_cosines = {} if targets_of is None else _target_cosines(states, targets_of)
    for slot in sorted({slot for key in states for slot in states.slots(key)}):
        made = {key: state for key in states if (state := states.at(key, slot)) is not None}
        following = [(state, states.at(key, Slot(slot.block, slot.place + 1))) for key, state in made.items()]
        next_cosines = [float(mean_cosine(one[None], other[None])) for one, other in following if other is not None]
        health.add(
            slot,
            slot_health(
                torch.stack(list(made.values())),
                embedding_norm,
                next_cosine=_mean(next_cosines),
                target_cosine=_mean(target_cosines.get(slot, [])),
            ),
        )
    return health


def _target_cosines(states: States, targets_of: Callable[[str], list[torch.Tensor]]) -> dict[Slot, list[float]]:
    """The cosine between state and target of each latent that has one, by slot, of at most MAX_SAMPLED rows."""
    cosines: dict[Slot, list[float]] = {}
    keys = list(states)
    for key in (keys[number] for number in spread(len(keys), MAX_SAMPLED)):
        targets = targets_of(key)
        for slot in states.slots(key):
            target, state = target_at(targets, slot), states.at(key, slot)
            if target is not None and state is not None:
                cosines.setdefault(slot, []).append(mean_cosine(state[None], target.cpu()[None]))
    return cosines


def slot_health(
    states: torch.Tensor,
    embedding_norm: float,
    *,
    next_cosine: float | None = None,
    target_cosine: float | None = None,
) -> SlotHealth:
    """The health of one slot, from the states [n, D] that n rows made there, n >= 1, in any dtype, on any device.

    Args:
        embedding_norm: see `mean_norm`.
        next_cosine, target_cosine: see `mean_cosine`.
    """
    return SlotHealth(
        num_rows=len(states),
        norm=mean_norm(states) / embedding_norm,
        row_cosine=row_cosine(states),
        effective_rank=effective_rank(states),
        next_cosine=next_cosine,
        target_cosine=target_cosine,
    )


def mean_norm(vectors: torch.Tensor) -> float:
    """The mean norm of vectors [n, D]; of the embeddings, what the states' norm is compared with."""
    return float(torch.linalg.vector_norm(vectors.detach(), dim=1, dtype=torch.float32).mean())


def mean_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean cosine between the rows of two matrices [n, D], pair by pair."""
    return float(cosine_similarity(one.double(), other.double(), dim=1).mean())


def row_cosine(states: torch.Tensor) -> float | None:
    """The mean cosine between two different rows of [n, D]; None for one row."""
    count = len(states)
    if count < 2:
        return None
    total = sum(normalize(chunk.double(), dim=1).sum(dim=0) for chunk in states.split(MAX_SAMPLED))
    assert isinstance(total, torch.Tensor)
    return float((total.square().sum() - count) / (count * (count - 1)))


def effective_rank(states: torch.Tensor) -> float:
    """The effective rank of states [n, D], of at most MAX_SAMPLED of them: from 1 to the smaller of n and D."""
    sampled = states[spread(len(states), MAX_SAMPLED)].double()
    return float(effective_rank_of(sampled @ sampled.T))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
