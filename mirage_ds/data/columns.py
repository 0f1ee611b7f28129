"""The rows of an index: each sample's location and model-independent facts, as columns in memory. Needs no torch.

index.py says which files they lie in.
"""

import mmap
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mirage_ds.data.ragged import Numbers, places, starts
from mirage_ds.errors import DataError

PART = 2**14  # samples that a check of all of them holds at a time: 2 MB, or 10 MB of entries
NOT_GIVEN = -1  # the `first_latent_size` of a sample whose blocks all have the configured K

SAMPLE = np.dtype(
    [
        ("offset", "<i8"),  # as in IndexEntry
        ("size", "<i8"),
        ("first_key_byte", "<i8"),  # in `keys`
        ("first_image", "<i8"),  # in `images`
        ("first_latent_size", "<i8"),  # in `latent_sizes`, which has one for each of its latent blocks; or NOT_GIVEN
        ("shard", "<i4"),
        ("key_bytes", "<i4"),
        ("input_images", "<i4"),
        ("helper_images", "<i4"),
        ("question_chars", "<i4"),
        ("answer_chars", "<i4"),
        ("image_blocks", "<i4"),
        ("latent_blocks", "<i4"),
    ]
)
COLUMNS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    "samples": (SAMPLE, ()),
    "images": (np.dtype("<i4"), (2,)),
    "latent_sizes": (np.dtype("<i4"), ()),
    "keys": (np.dtype("u1"), ()),
}
"""Of each file: the type of its values, and the shape of one of its lines."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One sample: its members are bytes [offset, offset + size) of a shard, headers and padding included."""

    key: str
    shard: int  # number in Manifest.shards
    offset: int
    size: int
    input_sizes: list[tuple[int, int]]  # width, height of each input image, as in the user's file
    helper_sizes: list[tuple[int, int]]
    question_chars: int  # of all that is not trained; each turn before the question counts TURN_CHARS beside its text
    answer_chars: int  # of all answers that are trained
    image_blocks: int  # before the first latent block, so of a row of one turn all
    latent_blocks: int
    latent_sizes: list[int] | None = None  # K of each latent block; None: all have the configured one

    def block_sizes(self, latent_size: int) -> list[int]:
        """K of each latent block, if the configured one is `latent_size`."""
        return self.latent_sizes or [latent_size] * self.latent_blocks


class Entries(Sequence[IndexEntry]):
    """Entries of samples by number, or as columns of those that are asked for."""

    @abstractmethod
    def take(self, numbers: Numbers) -> "Index":
        """Copies the entries of these samples; a sample may be named more than once.

        Raises:
            DataError: what one of them says is not in the other columns.
        """

    @overload
    def __getitem__(self, number: int) -> IndexEntry: ...
    @overload
    def __getitem__(self, number: slice) -> "Index": ...
    def __getitem__(self, number: int | slice) -> "IndexEntry | Index":
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.take(np.array([range(len(self))[number]])).entries()[0]

    def __iter__(self) -> Iterator[IndexEntry]:
        for part in self.parts():
            yield from part.entries()

    def parts(self, size: int = PART) -> Iterator["Index"]:
        """All samples, in order, so many at a time: what a check of all of them holds in memory."""
        return map(self.take, parts_of(len(self), size))


@dataclass(frozen=True, eq=False)
class Index(Entries):
    """The columns of N samples: `index.samples["question_chars"]` is [N].

    What each sample has in the other three files follows on what the one before it has. The entries of mapped files are
    trusted as far as their digests were compared: see `check_digests`.
    """

    samples: npt.NDArray[np.void]  # [N] SAMPLE
    images: npt.NDArray[np.int32]  # [images, 2]: width, height
    latent_sizes: npt.NDArray[np.int32]  # [K that are given]
    keys: npt.NDArray[np.uint8]  # [bytes]
    where: str = "in memory"  # for messages
    mappings: tuple[mmap.mmap, ...] = ()  # of mapped files

    @classmethod
    def of(cls, entries: Sequence[IndexEntry]) -> "Index":
        """The columns of these entries."""
        images = [size for entry in entries for size in (*entry.input_sizes, *entry.helper_sizes)]
        keys = [entry.key.encode() for entry in entries]
        given = [len(entry.latent_sizes or ()) for entry in entries]
        samples = np.zeros(len(entries), SAMPLE)
        for name in ("offset", "size", "shard", "question_chars", "answer_chars", "image_blocks", "latent_blocks"):
            samples[name] = [getattr(entry, name) for entry in entries]
        samples["key_bytes"] = [len(key) for key in keys]
        samples["input_images"] = [len(entry.input_sizes) for entry in entries]
        samples["helper_images"] = [len(entry.helper_sizes) for entry in entries]
        samples["first_key_byte"] = starts(samples["key_bytes"])
        samples["first_image"] = starts(samples["input_images"] + samples["helper_images"])
        samples["first_latent_size"] = np.where(given, starts(np.array(given, np.int64)), NOT_GIVEN)
        assert not np.any(given != np.where(given, samples["latent_blocks"], 0)), "a K for each latent block, or none"
        return cls(
            samples,
            np.array(images, np.int32).reshape(-1, 2),
            np.array([size for entry in entries for size in entry.latent_sizes or ()], np.int32),
            np.frombuffer(b"".join(keys), np.uint8),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, numbers: Numbers) -> "Index":
        taken = self._copy(numbers)
        for mapping in self.mappings:  # stays in the page cache, but is no longer this process's memory
            mapping.madvise(mmap.MADV_DONTNEED)
        return taken

    def _copy(self, numbers: Numbers) -> "Index":
        samples = self.samples[numbers]
        given = samples["first_latent_size"] != NOT_GIVEN
        images = samples["input_images"].astype(np.int64) + samples["helper_images"]
        values, latent_sizes, keys = (
            self._values(column, samples[first], counts)
            for column, first, counts in (
                (self.images, "first_image", images),
                (self.latent_sizes, "first_latent_size", np.where(given, samples["latent_blocks"], 0)),
                (self.keys, "first_key_byte", samples["key_bytes"]),
            )
        )
        samples["first_image"] = starts(images)
        samples["first_latent_size"] = np.where(given, starts(np.where(given, samples["latent_blocks"], 0)), NOT_GIVEN)
        samples["first_key_byte"] = starts(samples["key_bytes"])
        return Index(samples, values, latent_sizes, keys, self.where)

    def _values(self, column: npt.NDArray[Any], first: Numbers, counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What samples have in a column, one behind the other."""
        if np.any((counts < 0) | (counts > 0) & ((first < 0) | (first + counts > len(column)))):
            raise DataError(
                f"the index contradicts itself ({self.where}): a sample has more than its files; expected what "
                "`mirage-data build` wrote; copy the folder of shards again, or build again"
            )
        return column[places(first, counts)]

    def block_sizes(self, latent_size: int) -> Numbers:
        """[latent blocks of all samples]: K of each, if the configured one is `latent_size`."""
        blocks = self.samples["latent_blocks"]
        sizes = np.full(blocks.sum(dtype=np.int64), latent_size, np.int64)
        sizes[np.repeat(self.samples["first_latent_size"] != NOT_GIVEN, blocks)] = self.latent_sizes
        return sizes

    def helper_images(self, latent_size: int) -> tuple[npt.NDArray[np.int32], Numbers]:
        """[N, 2], [N]: width, height and K of the helper images of all samples that have a latent block."""
        helpers, blocks = self.samples["helper_images"], self.samples["latent_blocks"]
        sizes = self.images[places(self.samples["first_image"] + self.samples["input_images"], helpers)]
        ordinals = places(np.zeros(len(self), np.int64), helpers)
        first_blocks = np.repeat(starts(blocks), helpers)
        pooled = ordinals < np.repeat(blocks, helpers)
        return sizes[pooled], self.block_sizes(latent_size)[(first_blocks + ordinals)[pooled]]

    def entries(self) -> list[IndexEntry]:
        """Of all samples at once."""
        images: list[tuple[int, int]] = [(width, height) for width, height in self.images.tolist()]
        latent_sizes, keys = self.latent_sizes.tolist(), self.keys.tobytes()
        entries = []
        for sample in self.samples.tolist():
            offset, size, key, image, latent, shard, length, inputs, helpers, *facts = sample
            question, answer, blocks, latents = facts
            entry = IndexEntry(
                key=keys[key : key + length].decode(errors="backslashreplace"),
                shard=shard,
                offset=offset,
                size=size,
                input_sizes=images[image : image + inputs],
                helper_sizes=images[image + inputs : image + inputs + helpers],
                question_chars=question,
                answer_chars=answer,
                image_blocks=blocks,
                latent_blocks=latents,
                latent_sizes=None if latent == NOT_GIVEN else latent_sizes[latent : latent + latents],
            )
            entries.append(entry)
        return entries


def parts_of(num_samples: int, size: int = PART) -> Iterator[Numbers]:
    """All numbers of samples, in order, so many at a time."""
    return (np.arange(start, min(start + size, num_samples)) for start in range(0, num_samples, size))


def columns_of(entries: Iterable[IndexEntry]) -> Iterator[Index]:
    """The columns of so many entries at a time, each part by itself."""
    remaining = iter(entries)
    while part := list(islice(remaining, PART)):
        yield Index.of(part)


def consecutive(parts: Iterable[Index]) -> Iterator[Index]:
    """Numbers what these parts have, in place, so that one behind the other they are the columns of all."""
    keys = images = latent_sizes = 0
    for index in parts:
        index.samples["first_key_byte"] += keys
        index.samples["first_image"] += images
        index.samples["first_latent_size"][index.samples["first_latent_size"] != NOT_GIVEN] += latent_sizes
        yield index
        keys, images = keys + len(index.keys), images + len(index.images)
        latent_sizes += len(index.latent_sizes)
