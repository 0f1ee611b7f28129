"""The states that rows made at their latents: kept in files, as they may be larger than memory.

rank_N.states    float32, [states, D]: of rank N's rows, in the order in which they were decoded
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mirage_ds.inference.feed import Slot

FLOAT_BYTES = 4


class States:
    """The own states of rows, by the key of the row and the slot."""

    def __init__(self, places: dict[str, tuple[Path, dict[Slot, int]]], size: int) -> None:
        """
        Args:
            places: of each row, in the order of the file: the file of its states, and the number of each in it.
            size: D.
        """
        self._places = places
        self._files = {path: _opened(path, size) for path, slots in places.values() if slots}

    def __iter__(self) -> Iterator[str]:
        """The keys of the rows, in the order of the file."""
        return iter(self._places)

    def slots(self, key: str) -> list[Slot]:
        """The slots at which a row made states, in their order; none for a row without an answer."""
        return list(self._places[key][1]) if key in self._places else []

    def at(self, key: str, slot: Slot) -> torch.Tensor | None:
        """The state [D] that a row made at a slot; None if it made none."""
        path, slots = self._places.get(key, (None, {}))
        if path is None or slot not in slots:
            return None
        return torch.from_numpy(np.array(self._files[path][slots[slot]]))


def _opened(path: Path, size: int) -> np.memmap:
    """The states [states, D] that are completely written; another rank may be adding to them."""
    shape = path.stat().st_size // (FLOAT_BYTES * size), size
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)
