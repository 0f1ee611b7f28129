"""Finds samples that are longer than `data.max_length` or `data.token_budget` before a run, without decoding an image.

The index bounds the length of each sample; only texts that may be too long are read and tokenized.
"""

import numpy as np

from mirage_ds.data.costs import MARKERS, SampleCosts, row_sizes
from mirage_ds.data.encode import Encoder
from mirage_ds.data.helpers import OWN, Helpers
from mirage_ds.data.index import Index, parts_of
from mirage_ds.data.ragged import Numbers
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError

MAX_UTF8_BYTES = 4  # of a character; a token of byte-level BPE has at least one byte
NUM_LISTED = 5


def check_lengths(encoder: Encoder, folder: ShardFolder, helpers: Helpers = OWN) -> None:
    """Compares every sample with the encoder's limit, if it has one.

    Raises:
        DataError: some are longer; the message has how many, and the first few with their lengths.
    """
    if encoder.max_length is None:
        return
    reader = SampleReader(folder, helpers=helpers.of_texts())
    template = encoder.count_tokens("", "", [], 0)
    index = helpers.of_texts().index(folder)
    too_long: dict[str, int] = {}
    for numbers in parts_of(len(index)):
        part = index.take(numbers)
        for place in np.flatnonzero(template + _most_tokens(encoder, part) > encoder.max_length).tolist():
            entry, sample = part[place], reader(int(numbers[place]))
            length = encoder.count_tokens(
                sample.text_input, sample.text_output, entry.input_sizes, len(sample.helper_images), sample.latent_sizes
            )
            if length > encoder.max_length:
                too_long[sample.key] = length
    if too_long:
        raise too_long_error(too_long, f"data.max_length={encoder.max_length}", folder)


def check_budget(folder: ShardFolder, costs: SampleCosts, budget: int) -> None:
    """Compares every sample with the tokens that a packed row may have.

    Raises:
        DataError: some are longer; as `check_lengths`.
    """
    too_long: dict[str, int] = {}
    for numbers in parts_of(len(costs.index)):
        lengths = costs.of(numbers).tokens
        over = np.flatnonzero(lengths > budget)
        for entry, length in zip(costs.index.take(numbers[over]).entries(), lengths[over].tolist(), strict=True):
            too_long[f"{folder.manifest.shards[entry.shard].name}/{entry.key}"] = length
    if too_long:
        raise too_long_error(too_long, f"data.token_budget={budget}", folder)


def too_long_error(too_long: dict[str, int], limit: str, folder: ShardFolder) -> DataError:
    """Names samples with their numbers of tokens, and the key and value of the limit."""
    listed = ", ".join(f"{key} with {length}" for key, length in list(too_long.items())[:NUM_LISTED])
    more = f" and {len(too_long) - NUM_LISTED} more" if len(too_long) > NUM_LISTED else ""
    return DataError(
        f"samples with more tokens than {limit}: {len(too_long)} ({folder.path}): {listed}{more}; samples are never "
        f"truncated; raise {limit.partition('=')[0]} to at least {max(too_long.values())}, make the images smaller "
        "with data.max_pixels, or build the shards without these rows"
    )


def _most_tokens(encoder: Encoder, index: Index) -> Numbers:
    """[n]: none of these samples has more tokens, without those of the template."""
    samples = index.samples
    sizes = row_sizes(index, encoder.image_tokens, "stage1", encoder.latent_size)
    text = MAX_UTF8_BYTES * (samples["question_chars"].astype(np.int64) + samples["answer_chars"])
    markers = MARKERS * (samples["image_blocks"].astype(np.int64) + samples["latent_blocks"])
    return text + sizes.pads + markers
