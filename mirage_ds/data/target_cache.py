"""Latent targets on disk: a helper image that went through the frozen tower once is not encoded again.

FOLDER/KEY.json     what the targets depend on: data, image processing, pooling, tower; KEY is its digest
FOLDER/KEY.targets  one slot for each helper image of the shards, in the order of the index: the CRC-32 of the values,
                    then K targets with their inverse norms, [K, D + 1] float32; K may differ between images

A slot counts only if its checksum is right: one that was never written, was cut off, or is being written is not there.
So any number of ranks, data workers and runs share a file, through the page cache, without a lock. It is read and
written by calls instead of mapped into memory: a full disk and a file that was cut off would kill a process that maps
it. The file is sparse: it takes the space of the slots that were written.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mirage_ds.data.index import load_index
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import name_unwritable
from mirage_ds.housekeeping import housekeeping

CHECKSUM = struct.Struct("<I")
KEY_DIGITS = 16  # hexadecimal
REMEDY = "check the disk of model.cache_targets"


@dataclass(frozen=True)
class TargetCache:
    """The targets of one folder of shards, for one tower and one way to pool."""

    path: Path  # KEY.targets
    first_slots: npt.NDArray[np.int64]  # [samples + 1]: helper images in all samples before each
    offsets: npt.NDArray[np.int64]  # [helper images + 1]: byte at which each slot begins, and the last one ends
    num_slots: int  # that fit into the size limit; later helper images are not kept

    @classmethod
    def open(
        cls,
        directory: Path,
        shards: ShardFolder,
        facts: dict[str, Any],
        *,
        latent_size: int,
        values: int,
        limit_bytes: int,
    ) -> "TargetCache":
        """The cache in `directory` of what `facts` decide; it may have targets of earlier runs.

        Args:
            facts: all that decides the targets of the shards' helper images, beside the shards themselves; JSON.
            latent_size: K of helper images for which the index has none; one of the facts.
            values: float32 values of each latent, D + 1.
            limit_bytes: largest size of the file.
        Raises:
            DataError: the directory cannot be written, or the index does not match the manifest.
        """
        description = json.dumps({"shards": shards.digest, **facts}, indent=2, sort_keys=True) + "\n"
        key = hashlib.sha256(description.encode()).hexdigest()[:KEY_DIGITS]
        with name_unwritable(directory, "set model.cache_targets to a folder where you may write"):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{key}.json").write_text(description)
        index = load_index(shards)
        first_slots = _sums(index.samples["latent_blocks"])
        offsets = _sums(CHECKSUM.size + 4 * values * index.block_sizes(latent_size))
        num_slots = int(np.searchsorted(offsets, limit_bytes, side="right")) - 1
        return cls(directory / f"{key}.targets", first_slots, offsets, num_slots)

    def slots(self, number: int) -> range:
        """The slots of a sample's helper images."""
        return range(*self.first_slots[number : number + 2].tolist())

    def read(self, slots: range) -> bytes | None:
        """The values of a sample's slots, [K, D + 1] float32 each; None if there is none, or one is not there."""
        first, *ends = self.offsets[slots.start : slots.stop + 1].tolist()
        data = b""
        if ends and slots.stop <= self.num_slots and self.path.exists():
            with housekeeping(f"latent targets were not read ({self.path})", REMEDY), self.path.open("rb", 0) as file:
                data = os.pread(file.fileno(), ends[-1] - first, first)
        if not data or len(data) < ends[-1] - first:
            return None
        parts = [data[start - first : end - first] for start, end in pairwise([first, *ends])]
        complete = all(CHECKSUM.unpack_from(part)[0] == zlib.crc32(part[CHECKSUM.size :]) for part in parts)
        return b"".join(part[CHECKSUM.size :] for part in parts) if complete else None

    def write(self, slots: Sequence[int], values: Sequence[bytes]) -> None:
        """Keeps the values of helper images in their slots. Where the system refuses, the run continues without."""
        with housekeeping(f"latent targets were not kept ({self.path})", REMEDY):
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                for slot, data in zip(slots, values, strict=True):
                    if slot < self.num_slots:
                        os.pwrite(file, CHECKSUM.pack(zlib.crc32(data)) + data, int(self.offsets[slot]))
            finally:
                os.close(file)


@dataclass(frozen=True)
class TargetCaches:
    """The targets of a run's folders of shards: one cache each, whose slots are numbered one cache after the other."""

    caches: tuple[TargetCache, ...]

    @cached_property
    def first_slots(self) -> npt.NDArray[np.int64]:
        """[caches]: the number of each one's first slot."""
        return _sums(np.array([cache.first_slots[-1] for cache in self.caches]))[:-1]

    def slots(self, which: int, own: range) -> range:
        """The numbers of a cache's own slots."""
        first = int(self.first_slots[which])
        return range(first + own.start, first + own.stop)

    def write(self, slots: Sequence[int], values: Sequence[bytes]) -> None:
        """As `TargetCache.write`."""
        of_slot = np.searchsorted(self.first_slots, slots, side="right") - 1
        for which in np.unique(of_slot).tolist():
            chosen = np.flatnonzero(of_slot == which).tolist()
            own_slots = np.array(slots)[chosen] - self.first_slots[which]
            self.caches[which].write(own_slots.tolist(), [values[place] for place in chosen])


def _sums(numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """[n + 1]: the sum of all numbers before each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(numbers, dtype=np.int64)])


def as_tensor(targets: bytes | None, num_latents: int) -> torch.Tensor | None:
    """What `TargetCache.read` returned of a sample, as [num_latents, D + 1] float32."""
    if targets is None:
        return None
    return torch.frombuffer(bytearray(targets), dtype=torch.float32).view(num_latents, -1)
