"""Reads the byte ranges that the plan names from tar shards, in worker processes; endless."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.index import load_index
from mirage_ds.data.plan import Plan, micro_batch_start
from mirage_ds.data.rows import Sample
from mirage_ds.data.shard_samples import from_members, parse_members, read_range
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import ConfigError, DataError

T = TypeVar("T")


class SampleReader:
    """Reads single samples of a shard folder, by their number."""

    def __init__(self, folder: ShardFolder) -> None:
        index = load_index(folder)
        self._paths = [folder.path / shard.name for shard in folder.manifest.shards]
        # Arrays, not objects: worker processes share them until somebody counts a reference.
        self._places = np.array([(entry.shard, entry.offset, entry.size) for entry in index], dtype=np.int64)
        self._keys = np.array([entry.key for entry in index])

    def __call__(self, number: int) -> Sample:
        """Reads and parses one sample; its key becomes SHARD/KEY, so that every later message names both.

        Raises:
            DataError: the bytes are not there or are not this sample.
        """
        shard, offset, size = self._places[number].tolist()
        path, key = self._paths[shard], str(self._keys[number])
        where = f"{path.name}/{key}"
        return from_members(where, parse_members(read_range(path, offset, size, where), key, where))


@dataclass(frozen=True)
class Share:
    """Which micro-batches one rank takes, from which position on."""

    rank: int
    world_size: int
    micro_batch_size: int  # per GPU
    gradient_accumulation_steps: int = 1
    start: int = 0  # samples of all ranks consumed before: a multiple of the global batch size

    def __post_init__(self) -> None:
        global_batch_size = self.world_size * self.micro_batch_size * self.gradient_accumulation_steps
        if self.start % global_batch_size:
            raise ConfigError(
                f"the data position is {self.start} samples (in the checkpoint), but a global batch has "
                f"{global_batch_size}; a run goes on at the border of two global batches; set micro_batch_size_per_gpu "
                "or gradient_accumulation_steps so that the global batch size divides the position"
            )


class MicroBatches(IterableDataset[T | DataError], Generic[T]):
    """One rank's micro-batches, endless.

    Worker w of W yields every W-th of them, from the w-th on; the DataLoader takes from its workers in turn, which
    restores the order: it is the same for any number of workers.

    An error is yielded, not raised: the DataLoader would wrap a raised one in a worker's traceback.
    """

    def __init__(
        self,
        reader: Callable[[int], Sample],
        plan: Plan,
        encoder: Callable[[Sample], EncodedSample],
        collate: Callable[[list[EncodedSample]], T],
        share: Share,
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._encoder = encoder
        self._collate = collate
        self._share = share

    def __iter__(self) -> Iterator[T | DataError]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            batch: T | DataError
            try:
                batch = self._micro_batch(number)
            except DataError as error:
                batch = error
            yield batch
            number += stride

    def _micro_batch(self, number: int) -> T:
        share = self._share
        start = micro_batch_start(share.start, number, share.rank, share.world_size, share.micro_batch_size)
        numbers = self._plan.samples(start, share.micro_batch_size)
        return self._collate([self._encoder(self._reader(sample)) for sample in numbers])


class Loader(DataLoader[Any], Generic[T]):
    """A DataLoader that raises the error which a dataset yields in place of a batch, when its turn comes."""

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def make_loader(
    folder: ShardFolder,
    encoder: Callable[[Sample], EncodedSample],
    collate: Callable[[list[EncodedSample]], T],
    share: Share,
    *,
    seed: int,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Loader[T]:
    """The endless micro-batches of one rank, in the plan's order.

    Args:
        num_workers: processes that read and encode, each with one thread (torch's DataLoader sees to that); 0 does it
            in this process.
        prefetch_factor: micro-batches that each worker prepares ahead.
        pin_memory: calls pin_memory() of each batch, for asynchronous copies to a GPU.
    Raises:
        DataError: the index does not fit the manifest; while iterating, a sample that cannot be used.
    """
    plan = Plan(folder.num_samples, folder.digest, seed)
    return Loader(
        MicroBatches(SampleReader(folder), plan, encoder, collate, share),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
    )


def _as_is(batch: T) -> T:
    """In place of the DataLoader's own conversion; a function, so that workers can be spawned as well as forked."""
    return batch
