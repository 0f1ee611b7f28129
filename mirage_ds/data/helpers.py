"""Control arms: what the helper images of a run's samples are replaced by (`data.helper`). Needs no torch.

They answer what a helper image's content is worth: the same shards, the same rows and places, but other images. See
docs/training.md.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mirage_ds.config import Config, HelperImages
from mirage_ds.data.columns import NOT_GIVEN, Entries, Index
from mirage_ds.data.images import open_image
from mirage_ds.data.index import load_index
from mirage_ds.data.plan import ORDER, epoch_order
from mirage_ds.data.ragged import Numbers, places, starts
from mirage_ds.data.rows import Sample, check_sample
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.texts import OUTPUT_IMAGE_TAG
from mirage_ds.errors import DataError

T = TypeVar("T")
GRAY = 128  # of 255, in each color
NUM_LISTED = 5


@dataclass(frozen=True)
class Helpers:
    """What takes the place of helper images, in the samples of any folder of shards and in its index."""

    images: HelperImages = True
    seed: int = 0  # of `shuffled`
    exif_orientation: bool = True  # as the encoder turns images: a gray one has the size that it sees

    @classmethod
    def of(cls, config: Config) -> "Helpers":
        """Those of a run. Stage 2 and text read no helper image."""
        helpers = cls(config.data.helper, config.run.seed, config.data.exif_orientation)
        return helpers if config.train.stage == "stage1" else helpers.of_texts()

    def of_texts(self) -> "Helpers":
        """The same where only the tokens of a sample matter: they change with `none` alone."""
        return self if self.images == "none" else OWN

    def facts(self) -> dict[str, Any]:
        """What decides, beside the shards, which image is encoded for a helper image; nothing if it is the row's own,
        so that targets that were kept before there were controls stay valid."""
        facts: dict[str, Any] = {} if self.images is True else {"helper": self.images}
        return facts | ({"helper_seed": self.seed, "helper_order": ORDER} if self.images == "shuffled" else {})

    def index(self, folder: ShardFolder) -> Entries:
        """The folder's index with the sizes of the images that take the place of helper images.

        Raises:
            DataError: as `load_index`; or rows have no image that could take this place.
        """
        index = load_index(folder)
        if self.images is True or self.images == "gray":
            return index
        self._check(index, folder)
        return Replaced(index, self, self.donors(index, folder.digest))

    def donors(self, index: Index, digest: str) -> Numbers | None:
        """[num_samples]: the number of the row whose helper images each row gets; None: its own, unless `shuffled`.

        All rows with helper images stand in one circle, in an order by seed and the folder's digest, and each gets
        those of the next: no row its own, and none is left out.
        """
        if self.images != "shuffled":
            return None
        donors = np.arange(len(index))
        rows = np.flatnonzero(index.samples["helper_images"])
        circle = rows[epoch_order(len(rows), f"{digest}/helpers", self.seed, epoch=0)]
        donors[circle] = np.roll(circle, -1)
        return donors

    def rows(self, own: Index, donors: Index) -> Index:
        """The index of rows after the replacement.

        Args:
            donors: of each row the one that `Helpers.donors` names.
        """
        if self.images is True or self.images == "gray":  # of the same size
            return own
        samples, helpers = own.samples.copy(), own.samples["helper_images"]
        if self.images == "none":
            samples["helper_images"], samples["latent_blocks"], samples["first_latent_size"] = 0, 0, NOT_GIVEN
            samples["first_image"] = starts(samples["input_images"])
            images = own.images[places(own.samples["first_image"], own.samples["input_images"])]
            return replace(own, samples=samples, images=images, latent_sizes=own.latent_sizes[:0])
        given = donors.samples
        first = given["first_image"] if self.images == "input" else given["first_image"] + given["input_images"]
        last = given[f"{'input' if self.images == 'input' else 'helper'}_images"] - 1
        numbers = np.minimum(places(np.zeros(len(own), np.int64), helpers), np.repeat(last, helpers))  # see `in_places`
        images = own.images.copy()
        images[places(samples["first_image"] + samples["input_images"], helpers)] = donors.images[
            np.repeat(first, helpers) + numbers
        ]
        return replace(own, samples=samples, images=images)

    def sample(self, sample: Sample, read_donor: Callable[[], Sample]) -> Sample:
        """A row after the replacement; a row without helper images stays as it is.

        Args:
            read_donor: reads the row that `donors` names; called for `shuffled` only.

        Raises:
            DataError: the images that take the place cannot be read; or with `gray` the row's own.
        """
        key, count = sample.key, len(sample.helper_images)
        if self.images is True or count == 0:
            return sample
        if self.images == "none":  # as in the stage text
            check_sample(sample, key)
            context = tuple(replace(turn, text=turn.text.replace(OUTPUT_IMAGE_TAG, "")) for turn in sample.context)
            answer = sample.text_output.replace(OUTPUT_IMAGE_TAG, "")
            return replace(sample, context=context, text_output=answer, helper_images=(), latent_sizes=())
        if self.images == "gray":
            return replace(sample, helper_images=tuple(self._gray(sample)))
        if self.images == "input":
            images, name = sample.input_images, f"{key}.input as helper"
        else:
            try:
                donor = read_donor()
            except DataError as error:
                raise DataError(f"no helper image of another row for {key} (data.helper=shuffled): {error}") from error
            images, name = donor.helper_images, f"{key} with {donor.key}.helper"
        if not images:
            raise DataError(
                f"no image takes the place of the helper image ({name}, data.helper={self.images}); by the index there "
                "is one; build the shards again"
            )
        return replace(sample, helper_images=tuple(in_places(images, count)), helper_name=name)

    def _gray(self, sample: Sample) -> list[bytes]:
        """Of the sizes in the files: the index has those of turned images, whatever the encoder does."""
        names = [f"{sample.key}.helper_{number}" for number in range(len(sample.helper_images))]
        images = zip(sample.helper_images, names, strict=True)
        return [gray_png(*open_image(*each, exif_orientation=self.exif_orientation).size) for each in images]

    def _check(self, index: Index, folder: ShardFolder) -> None:
        """Raises: DataError: rows have no image for their places."""
        has_helper = index.samples["helper_images"] > 0
        if self.images == "shuffled" and has_helper.sum() < 2:
            raise DataError(
                f"rows with helper images: {has_helper.sum()} ({folder.place}); data.helper=shuffled gives each the "
                "images of another row, and needs at least 2; use other shards, or another data.helper"
            )
        without = np.flatnonzero(has_helper & (index.samples["input_images"] == 0))
        if self.images == "input" and without.size:
            listed = index.take(without[:NUM_LISTED]).entries()
            names = [f"{folder.manifest.shards[entry.shard].name}/{entry.key}" for entry in listed]
            more = f" and {len(without) - NUM_LISTED} more" if len(without) > NUM_LISTED else ""
            raise DataError(
                f"rows with a helper image but no input image: {len(without)} ({folder.place}): {', '.join(names)}"
                f"{more}; data.helper=input puts the input image in place of the helper image, so each of these rows "
                "needs one; build the shards without these rows, or use another data.helper"
            )


@dataclass(frozen=True)
class Replaced(Entries):
    """The entries of a folder after the replacement."""

    own: Index
    helpers: Helpers
    donors: Numbers | None  # see `Helpers.donors`

    def __len__(self) -> int:
        return len(self.own)

    def take(self, numbers: Numbers) -> Index:
        own = self.own.take(numbers)
        donors = own if self.donors is None else self.own.take(self.donors[numbers])
        return self.helpers.rows(own, donors)


OWN = Helpers()
"""Every row has its own helper images."""


def in_places(images: Sequence[T], count: int) -> list[T]:
    """An image for each of `count` places: the one with its number, or the last where there are fewer."""
    return [images[min(place, len(images) - 1)] for place in range(count)]


@lru_cache(maxsize=256)  # images of one data set often have the same few sizes; a PNG of one color is small
def gray_png(width: int, height: int) -> bytes:
    """The bytes of a PNG file of this size, all of whose pixels are (128, 128, 128)."""
    file = io.BytesIO()
    Image.new("L", (width, height), GRAY).save(file, "PNG")
    return file.getvalue()
