"""What a run cannot use, counted by reason before it starts: for its stage, K and `data.max_length`.

No image is decoded: the index has the sizes of all images, and bounds the length of each sample.
"""

import numpy as np

from mirage_ds.data.columns import Index, parts_of
from mirage_ds.data.encode import LATE_IMAGE_REMEDY, Encoder
from mirage_ds.data.helpers import OWN, Helpers
from mirage_ds.data.lengths import too_long
from mirage_ds.data.pooling import POOLING_REMEDY, pooling_fault
from mirage_ds.data.reasons import Reason
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import DataError


def check_usable(encoder: Encoder, folder: ShardFolder, helpers: Helpers = OWN) -> None:
    """Checks all samples of a folder for what the encoder would refuse.

    Raises:
        DataError: it would refuse some; the message has for each reason how many, and the first few.
    """
    checks = (not_pooled, hidden_late, too_long)
    reasons = [reason for check in checks if (reason := check(encoder, folder, helpers))]
    if reasons:
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise DataError(f"the run cannot use samples ({folder.place}, samples: {folder.num_samples}):{listed}")


def not_pooled(encoder: Encoder, folder: ShardFolder, helpers: Helpers) -> Reason:
    """The samples with a helper image that has too few patches for its K; only stage 1 encodes helper images."""
    reason = Reason("helper images that cannot be pooled to K latents", f"expected {POOLING_REMEDY}")
    if encoder.stage != "stage1":
        return reason
    index = helpers.index(folder)
    known: dict[tuple[int, ...], bool] = {}  # by rows, columns and K, of which data sets have few: whether they fit
    for numbers in parts_of(len(index)):
        part = index.take(numbers)
        sizes, latent_sizes = part.helper_images(encoder.latent_size)
        grids = np.column_stack([encoder.merged_grids(sizes), latent_sizes])
        kinds, kind_of = np.unique(grids, axis=0, return_inverse=True)
        for rows, columns, size in kinds.tolist():
            kind = (rows, columns, size)
            if kind not in known:
                known[kind] = pooling_fault([(rows, columns)], [size], encoder.compress_strategy) is None
        fits = np.array([known[tuple(kind)] for kind in kinds.tolist()], bool)[kind_of]
        pooled = np.minimum(part.samples["helper_images"], part.samples["latent_blocks"])
        unfit = np.unique(np.repeat(np.arange(len(part)), pooled)[~fits])
        for place in unfit[: reason.num_missing].tolist():
            reason.examples.append(_fault(encoder, folder, part, place))
        reason.count += len(unfit)
    return reason


def hidden_late(encoder: Encoder, folder: ShardFolder, helpers: Helpers) -> Reason:
    """The samples of several turns that have an image after a latent block, where images are hidden from there on."""
    reason = Reason("images after the first latent block", LATE_IMAGE_REMEDY)
    if not encoder.may_hide_images or encoder.stage == "text":
        return reason
    for part in helpers.of_texts().index(folder).parts():
        late = part.samples["input_images"] > part.samples["image_blocks"]
        found = np.flatnonzero(late & (part.samples["latent_blocks"] > 0))
        for entry in part.take(found[: reason.num_missing]).entries():
            reason.examples.append(f"{folder.manifest.shards[entry.shard].name}/{entry.key}")
        reason.count += len(found)
    return reason


def _fault(encoder: Encoder, folder: ShardFolder, part: Index, place: int) -> str:
    """Why a sample is in `not_pooled`, and its first such image."""
    entry = part[place]
    grids = encoder.merged_grids(entry.helper_sizes).tolist()
    fault = pooling_fault(grids, entry.block_sizes(encoder.latent_size), encoder.compress_strategy)
    assert fault is not None, "one of its images does not fit"
    number, reason = fault
    return f"{reason} ({folder.manifest.shards[entry.shard].name}/{entry.key}.helper_{number})"
