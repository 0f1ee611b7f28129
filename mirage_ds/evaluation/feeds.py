"""What is fed at the latents instead of the model's own states, to measure what their content is worth.

    shuffled   the states that another row of the file made: the content of another question
    mean       the mean of all rows' states, slot by slot: what all rows have in common
    zeroed     zeros, which the model has never seen as an input

A slot is a latent's place in an answer, such as the second latent of the first block. `shuffled` and `mean` need the
states that every row makes from its own latents, so the file is decoded twice: `OwnStates` records the first pass.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.states import States
from mirage_ds.inference.feed import Slot


class ShuffledStates:
    """Feeds every row the states of another one, slot by slot.

    The other row is the next one in a cycle through all rows (`next_rows`). Where that row made no state at the slot
    (no latent block, fewer blocks, a shorter block), it is the first row after it in the cycle that made one. If no
    other row did, there is nothing to feed: the row keeps its own state, which counts as not replaced.
    """

    def __init__(self, states: States, next_row: Mapping[str, str]) -> None:
        self._states = states
        self._next_row = next_row

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        made = (self._states.at(row, slot) for row in self._others(key))
        return next((state for state in made if state is not None), None)

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


def next_rows(rows: Sequence[Row], seed: int) -> dict[str, str]:
    """One random cycle through all rows: a permutation without fixed points, set by the seed and the number of rows.

    Returns:
        The key of the row that follows each row, by its key.

    Raises:
        DataError: there is only one row.
    """
    if len(rows) == 1:
        raise DataError(
            f"the file has only 1 row ({rows[0].where}), so there are no other latents to feed (--latents shuffled); "
            "expected a file of at least 2 rows; add rows, or choose another value of --latents"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    keys = [rows[number].sample.key for number in order]
    return dict(zip(keys, keys[1:] + keys[:1], strict=True))
