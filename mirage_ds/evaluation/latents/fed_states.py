"""What is fed at the latents instead of the model's own states, to measure what their content is worth.

    shuffled   the states that another row of the file made: the content of another question
    mean       the mean of all rows' states, slot by slot: what all rows have in common
    fixed      one state of one row, at every latent of every other row
    noise      the own state, with noise of a given size added
    oracle     the latent targets of the row's true helper images: what stage 1 trains the states towards
    first      the first state of the block, again at each of its later latents

A slot is a latent's place in an answer, such as the second latent of the first block. A feed is called row by row and
depends on nothing but the row and the slot: not on the batch, nor on the rank. Where it has nothing to feed, the row
keeps its own state, which counts as not replaced.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from mirage_ds.evaluation.latents.states import States
from mirage_ds.inference.feed import Slot

FIRST = Slot(0, 0)


class ShuffledStates:
    """Feeds every row the states of another one, slot by slot.

    The other row is the next one in a cycle through all rows (`next_rows`). Where that row made no state at the slot
    (no latent block, fewer blocks, a shorter block), it is the first row after it in the cycle that made one. If no
    other row did, there is nothing to feed.
    """

    def __init__(self, states: States, next_row: Mapping[str, str]) -> None:
        self._states = states
        self._next_row = next_row

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        made = (self._states.at(row, slot) for row in self._others(row_of(key)))
        return next((state for state in made if state is not None), None)

    def _others(self, key: str) -> Iterator[str]:
        row = self._next_row[key]
        while row != key:
            yield row
            row = self._next_row[row]


class MeanStates:
    """Feeds every row the mean of all rows' states, slot by slot, over the rows that made a state at the slot.

    If one row alone did, its mean is its own state, which counts as replaced.
    """

    def __init__(self, states: States) -> None:
        sums: dict[Slot, torch.Tensor] = {}
        counts: Counter[Slot] = Counter()
        for key in states:
            for slot in states.slots(key):
                state = states.at(key, slot)
                assert state is not None, "the slot was listed"
                sums[slot] = sums.get(slot, 0) + state.double()
                counts[slot] += 1
        self._means = {slot: (total / counts[slot]).float() for slot, total in sums.items()}

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        return self._means.get(slot)


class FixedState:
    """Feeds one state everywhere: the first state of the first row of a cycle that made one.

    That row itself gets the first state of the next such row: never its own.
    """

    def __init__(self, states: States, cycle: Sequence[str]) -> None:
        made = ((key, states.at(key, FIRST)) for key in cycle)
        self._two = [(key, state) for key, state in made if state is not None][:2]

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        return next((state for row, state in self._two if row != row_of(key)), None)


class NoisyStates:
    """Feeds the own state plus Gaussian noise, whose norm is `factor` times the state's; drawn by seed, key, slot."""

    def __init__(self, factor: float, seed: int) -> None:
        self._factor, self._seed = factor, seed

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor:
        state = own.float().cpu()
        digest = hashlib.sha256(f"{self._seed}/noise/{key}/{slot.block}/{slot.place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        noise = torch.randn(len(state), generator=generator)
        return state + self._factor * state.norm() / noise.norm() * noise


class OracleStates:
    """Feeds block b of a row the latent targets of the row's helper image b.

    A latent beyond the row's helper images, or beyond K of its image, has no target.
    """

    def __init__(self, targets_of: Callable[[str], list[torch.Tensor]]) -> None:
        """
        Args:
            targets_of: the targets [K, D] of each helper image of a row, by its key.
        """
        self._targets_of = targets_of
        self._known: dict[str, list[torch.Tensor]] = {}

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        row = row_of(key)
        if row not in self._known:
            self._known[row] = self._targets_of(row)
        return target_at(self._known[row], slot)


class FirstStates:
    """Feeds the first state of a block at its later latents too; the first one itself is the row's own."""

    def __init__(self) -> None:
        self._first: dict[str, torch.Tensor] = {}  # of each row's current block

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        if slot.place == 0:
            self._first[key] = own.clone()
            return None
        return self._first[key]


def target_at(targets: Sequence[torch.Tensor], slot: Slot) -> torch.Tensor | None:
    """The target [D] of a latent, from those of a row's helper images, each [K, D]; None if it has none."""
    if slot.block < len(targets) and slot.place < len(targets[slot.block]):
        return targets[slot.block][slot.place]
    return None


def row_of(key: str) -> str:
    """The key of the row of an answer, which for a further answer to the same row is KEY/SAMPLE."""
    return key.partition("/")[0]


def cycle_of(keys: Sequence[str], seed: int) -> list[str]:
    """The keys in a random order, set by the seed and their number."""
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    return [keys[number] for number in order]


def next_rows(keys: Sequence[str], seed: int) -> dict[str, str]:
    """One random cycle through rows: the key that follows each key. No row follows itself, if there are at least 2."""
    cycle = cycle_of(keys, seed)
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
