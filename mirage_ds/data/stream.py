"""Streams micro-batches without end: reads byte ranges of tar shards in the plan's order, in worker processes."""

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mirage_ds.config import OnFault
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.helpers import OWN, Helpers
from mirage_ds.data.index import load_index
from mirage_ds.data.remote import MAX_STALLS_IN_ROW
from mirage_ds.data.rows import Sample
from mirage_ds.data.shard_samples import from_members, parse_members, read_range
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.steps import Steps
from mirage_ds.data.target_cache import TargetCache, TargetCaches
from mirage_ds.errors import DataError, StallError, WrongShardError

T = TypeVar("T")
MAX_FAULTS_IN_ROW = 100  # then it is not single samples


class SampleReader:
    """Reads samples of a shard folder by their number, with the helper images of the run's control arm, or what a
    target cache has for them."""

    def __init__(
        self, folder: ShardFolder, targets: TargetCache | None = None, helpers: Helpers = OWN, name: str = ""
    ) -> None:
        """
        Args:
            name: what the keys of samples begin with.
        """
        self._name = name
        self._targets = targets
        self._helpers = helpers
        self._place, self._shards = folder.place, folder.manifest.shards
        self._index = load_index(folder)
        self._donors = helpers.donors(self._index, folder.digest)

    def __call__(self, number: int, *, again: bool = False) -> Sample:
        """Reads and parses one sample; its key becomes SHARD/KEY, so that every later message has both.

        Where the cache has its targets, its helper images stay as they are: they are not encoded.

        Args:
            again: what was read before cannot be used, so from the server if there is one.

        Raises:
            DataError: the bytes cannot be read or are not this sample, or `Helpers.sample` raises.
        """
        sample = self._read(number, again)
        slots = range(0) if self._targets is None else self._targets.slots(number)
        cached = None if self._targets is None else self._targets.read(slots)
        if cached is None:
            sample = self._helpers.sample(sample, lambda: self._read_donor(number, again))
        return replace(sample, target_slots=slots, cached_targets=cached)

    def _read(self, number: int, again: bool) -> Sample:
        """One that cannot be parsed is read once more: what a server sent, or what is kept of it, may be damaged."""
        entry = self._index[number]
        shard = self._shards[entry.shard]
        where = f"{self._name}{shard.name}/{entry.key}"
        data = read_range(self._place, shard, entry.offset, entry.size, where, again=again)
        try:
            return from_members(where, parse_members(data, entry.key, where))
        except DataError:
            if again:
                raise
            return self._read(number, again=True)

    def _read_donor(self, number: int, again: bool) -> Sample:
        assert self._donors is not None, "only `shuffled` asks"
        return self._read(int(self._donors[number]), again)


class FoldersReader:
    """Reads samples of a run's folders of shards by their number in all of them."""

    def __init__(self, shards: ShardFolders, targets: TargetCaches | None = None, helpers: Helpers = OWN) -> None:
        """
        Args:
            helpers: with `shuffled`, rows get the images of other rows of their own folder.
        """
        self._shards = shards
        self._targets = targets
        caches = [None] * len(shards.folders) if targets is None else targets.caches
        names = [f"{name}/" for name in shards.names] if len(shards.folders) > 1 else [""]
        self._readers = [
            SampleReader(folder, cache, helpers, name)
            for folder, cache, name in zip(shards.folders, caches, names, strict=True)
        ]

    def __call__(self, number: int, *, again: bool = False) -> Sample:
        """One sample, with the number of its set; its key becomes SET/SHARD/KEY where there are several sets.

        Raises:
            DataError: see SampleReader, also for `again`.
        """
        which, own_number = self._shards.locate(number)
        sample = self._readers[which](own_number, again=again)
        if self._targets is not None:
            sample = replace(sample, target_slots=self._targets.slots(which, sample.target_slots))
        return replace(sample, set_number=which)


class MicroBatches(IterableDataset[T | DataError], Generic[T]):
    """One rank's micro-batches, without end.

    Worker w of W yields every W-th of them, starting with the w-th. The DataLoader takes from its workers in turn, so
    that the order is the same for any number of workers.

    An error is yielded instead of raised, as the DataLoader would wrap a raised one in a worker's traceback.
    """

    def __init__(
        self,
        reader: SampleReader | FoldersReader,
        steps: Steps,
        encoder: Callable[[Sample], EncodedSample],
        collate: Callable[[list[EncodedSample]], T],
        on_fault: OnFault = "stop",
        drops_image: Callable[[int], bool] | None = None,
    ) -> None:
        self._on_fault = on_fault
        self._drops_image = drops_image
        self._reader = reader
        self._steps = steps
        self._encoder = encoder
        self._collate = collate

    def __iter__(self) -> Iterator[T | DataError]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for positions in islice(self._steps.micro_batches(), first, None, stride):
            batch: T | DataError
            try:
                batch = self._collate([self._sample(position) for position in positions])
            except DataError as error:
                batch = error
            yield batch

    def _sample(self, position: int) -> EncodedSample:
        numbers = self._steps.candidates(position)
        sample = first_usable(partial(encode_read, self._encoder, self._reader), numbers, self._on_fault)
        if self._drops_image is not None and self._drops_image(position):
            return replace(sample, hides_images=True)
        return sample


def encode_read(
    encoder: Callable[[Sample], EncodedSample], reader: SampleReader | FoldersReader, number: int
) -> EncodedSample:
    """One sample of the folder, encoded; one whose images cannot be used is read once more, as in `SampleReader`.

    Raises:
        DataError: it cannot be used.
    """
    sample = reader(number)
    try:
        return encoder(sample)
    except DataError:
        return encoder(reader(number, again=True))


def first_usable(encode: Callable[[int], EncodedSample], numbers: Iterable[int], on_fault: OnFault) -> EncodedSample:
    """The first of these samples that can be used; with `stop` it must be the first of all.

    It depends on the order alone, so every number of ranks, and a run that resumes, takes the same.

    Args:
        numbers: sample numbers, of the sample that is due and then of those after it.

    Raises:
        DataError: it cannot be used, or with `skip` none of MAX_FAULTS_IN_ROW.
        StallError: likewise: its server does not answer, or with `skip` for MAX_STALLS_IN_ROW.
        WrongShardError: its shard has twice come with another sha256; it is not the sample's fault.
    """
    faults: list[str] = []
    stalls = 0
    for number in numbers:
        try:
            sample = encode(number)
        except DataError as error:
            faults.append(str(error))
            stalls = stalls + 1 if isinstance(error, StallError) else 0
            if on_fault == "stop" or stalls == MAX_STALLS_IN_ROW or isinstance(error, WrongShardError):
                raise
            if len(faults) == MAX_FAULTS_IN_ROW:
                break
        else:
            return replace(sample, faults=faults) if faults else sample
    raise DataError(
        f"{len(faults)} samples in a row cannot be used; the first: {faults[0]}; data.on_fault=skip is for single "
        "samples; check the shards and the model, for example with `mirage-data check`"
    )


class Loader(DataLoader[Any], Generic[T]):
    """A DataLoader that raises an error which the dataset yielded in place of a batch, at its turn."""

    timeout_s: int | None = None
    """Longest wait for a batch. Its own `timeout` does not cover a worker that stops while it hands a batch over."""

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        batches = super().__iter__()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wait for data")
        for number in count():
            try:
                batch = pool.submit(next, batches).result(self.timeout_s)
            except TimeoutError as error:
                raise StallError(
                    f"no batch came for {self.timeout_s} s (micro-batch {number} of this rank since its start); the "
                    "limit is four fifths of distributed.timeout_s; look above for what the data workers printed, and "
                    "check the disk of data.shards and TMPDIR"
                ) from error
            if isinstance(batch, DataError):
                raise batch
            yield batch


def make_loader(
    reader: SampleReader | FoldersReader,
    encoder: Callable[[Sample], EncodedSample],
    collate: Callable[[list[EncodedSample]], T],
    steps: Steps,
    *,
    num_workers: int,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    on_fault: OnFault = "stop",
    timeout_s: int | None = None,
    drops_image: Callable[[int], bool] | None = None,
) -> Loader[T]:
    """The micro-batches of one rank's steps, from its start on, without end.

    Args:
        reader: gives the sample of a number, see FoldersReader.
        num_workers: processes that read and encode, each with one thread (torch's DataLoader sets it); 0: in this
            process.
        prefetch_factor: micro-batches that each worker prepares ahead.
        timeout_s: longest wait for a batch; None: no limit.
        on_fault: what becomes of a sample that cannot be used, see `first_usable`.
        pin_memory: calls pin_memory() of each batch, for asynchronous copies to a GPU.
        drops_image: whether the images of the sample at a position of the order are hidden, see `image_dropout.py`.
    Raises:
        DataError: while iterating: a sample cannot be used.
    """
    loader: Loader[T] = Loader(
        MicroBatches(reader, steps, encoder, collate, on_fault, drops_image),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
    )
    loader.timeout_s = timeout_s
    return loader


def _leave_signals(worker: int) -> None:
    """In a worker: the rank answers these signals, whose handlers may wait for a thread that its forks do not have."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: T) -> T:
    """Replaces the DataLoader's own conversion; a module-level function, so that workers can also be spawned."""
    return batch
