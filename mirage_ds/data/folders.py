"""The folders of shards of a run as one data set, whose samples are numbered one folder after the other.

What has to do with all samples is done folder by folder; nothing of a folder is copied. Needs no torch.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mirage_ds.config import DataConfig
from mirage_ds.data.places import Place, Reading
from mirage_ds.data.shards import ShardFolder, find_manifest, load_manifest, read_manifest
from mirage_ds.errors import DataError
from mirage_ds.paths import Location


@dataclass(frozen=True)
class ShardFolders:
    """At least one folder of shards; a set is one of them."""

    folders: tuple[ShardFolder, ...]
    weights: tuple[float, ...]  # passes over each in an epoch

    @property
    def num_samples(self) -> int:
        return sum(folder.num_samples for folder in self.folders)

    @property
    def where(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(folder.place) for folder in self.folders)

    @cached_property
    def first_numbers(self) -> npt.NDArray[np.int64]:
        """[sets]: the number of each set's first sample."""
        return np.array([0, *accumulate(folder.num_samples for folder in self.folders)][:-1])

    @cached_property
    def digest(self) -> str:
        """What identifies the data set: of one folder with weight 1 its own, else of all digests and weights."""
        if self.weights == (1.0,):
            return self.folders[0].digest
        parts = [[folder.digest, weight] for folder, weight in zip(self.folders, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A short one of each set: the last part of its path, with a number where an earlier set has the same."""
        names: list[str] = []
        for folder in self.folders:
            base = folder.place.name
            tries = (base, *(f"{base}-{number}" for number in range(2, len(self.folders) + 2)))
            names.append(next(name for name in tries if name not in names))
        return tuple(names)

    def locate(self, number: int) -> tuple[int, int]:
        """The set of a sample, and its number there."""
        which = int(np.searchsorted(self.first_numbers, number, side="right")) - 1
        return which, number - int(self.first_numbers[which])


def load_folders(data: DataConfig, load: Callable[[Location, Reading], ShardFolder] = load_manifest) -> ShardFolders:
    """The folders of `data.shards`.

    Args:
        load: how one is opened, `load_manifest` or `read_manifest`.
    Raises:
        DataError: one cannot be opened, or two have the same samples.
    """
    folders = tuple(load(each.path, Reading.of(data)) for each in data.sets)
    places: dict[str, Place] = {}
    for folder in folders:
        other = places.setdefault(folder.digest, folder.place)
        if other is not folder.place:
            raise DataError(
                f"two folders of data.shards have the same samples ({other} and {folder.place}, manifest "
                f"{folder.digest:.12}); each may be named once; remove one of them, and give the other one the "
                "weight of both"
            )
    return ShardFolders(folders, tuple(each.weight for each in data.sets))


def find_folders(data: DataConfig) -> ShardFolders | None:
    """The folders of `data.shards` with no more than their manifests read; None where not all of them are there.

    Raises:
        DataError: a manifest is damaged, or two folders have the same samples.
    """
    if not all(find_manifest(each.path, Reading.of(data)) for each in data.sets):
        return None
    return load_folders(data, read_manifest)
