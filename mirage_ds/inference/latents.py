"""What is fed at the latents instead of the model's own states, to measure what their content is worth.

    shuffled   the states that another row of the file made: the content of another question
    mean       the mean of all rows' states, slot by slot: what all rows have in common
    zeroed     zeros, which the model has never seen as an input

A slot is a latent's place in an answer, such as the second latent of the first block. `shuffled` and `mean` need the
states that every row makes from its own latents, so the file is decoded twice: `OwnStates` records the first pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from mirage_ds.data.rows import Sample
from mirage_ds.errors import DataError


class Slot(NamedTuple):
    """A latent's place in an answer, counted from 0."""

    block: int
    place: int  # within the block


class Feed(Protocol):
    """Chooses what is fed at one latent of one row."""

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        """Called for every latent of every row that has not ended, in order.

        Args:
            key: the row's.
            own: [D]: the state that the model made, on the model's device.

        Returns:
            [D], on any device, to be fed instead; None: the own state is fed.
        """


class OwnStates:
    """Feeds every row its own states, and keeps a copy of them on the CPU, in float32."""

    def __init__(self) -> None:
        self.by_row: dict[str, dict[Slot, torch.Tensor]] = defaultdict(dict)

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> None:
        # Without a copy, a row of [B, D] would keep all of it in memory.
        self.by_row[key][slot] = own.to("cpu", torch.float32, copy=True)


class ShuffledStates:
    """Feeds every row the states of another one, slot by slot.

    The other row is the next one in a cycle through all rows (`next_rows`). Where that row made no state at the slot
    (no latent block, fewer blocks, a shorter block), it is the first row after it in the cycle that made one. If no
    other row did, there is nothing to feed: the row keeps its own state, which counts as not replaced.
    """

    def __init__(self, own: OwnStates, next_row: Mapping[str, str]) -> None:
        self._states = own.by_row
        self._next_row = next_row

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        made = (self._states[row][slot] for row in self._others(key) if slot in self._states.get(row, {}))
        return next(made, None)

    def _others(self, key: str) -> Iterator[str]:
        row = self._next_row[key]
        while row != key:
            yield row
            row = self._next_row[row]


class MeanStates:
    """Feeds every row the mean of all rows' states, slot by slot, over the rows that made a state at the slot.

    If no row did, there is nothing to feed: the row keeps its own state, which counts as not replaced. If one row alone
    did, its mean is its own state, which counts as replaced.
    """

    def __init__(self, own: OwnStates) -> None:
        made = defaultdict(list)
        for states in own.by_row.values():
            for slot, state in states.items():
                made[slot].append(state)
        self._means = {
            slot: torch.stack(states).mean(dim=0, dtype=torch.float64).float() for slot, states in made.items()
        }

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        return self._means.get(slot)


def zeroed(key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor:
    """Feeds zeros."""
    return torch.zeros_like(own)


def next_rows(rows: Sequence[tuple[str, Sample]], seed: int) -> dict[str, str]:
    """One random cycle through all rows: a permutation without fixed points, set by the seed and the number of rows.

    Args:
        rows: file:line and sample of each.

    Returns:
        The key of the row that follows each row, by its key.

    Raises:
        DataError: there is only one row.
    """
    if len(rows) == 1:
        raise DataError(
            f"the file has only 1 row ({rows[0][0]}), so there are no other latents to feed (--latents shuffled); "
            "expected a file of at least 2 rows; add rows, or choose another value of --latents"
        )
    assert len({sample.key for _, sample in rows}) == len(rows), "keys name the rows"
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    keys = [rows[number][1].key for number in order]
    return dict(zip(keys, keys[1:] + keys[:1], strict=True))
