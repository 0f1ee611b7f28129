"""Finds samples that are longer than `data.max_length` or `data.token_budget` before a run, without decoding an image.

The index bounds the length of each sample; only texts that may be too long are read and tokenized.
"""

import numpy as np
import numpy.typing as npt

from mirage_ds.data.costs import MARKERS
from mirage_ds.data.encode import Encoder
from mirage_ds.data.helpers import OWN, Helpers
from mirage_ds.data.index import IndexEntry, load_index
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
    too_long: dict[str, int] = {}
    for number, entry in enumerate(helpers.of_texts().index(folder)):
        if template + _most_tokens(encoder, entry) <= encoder.max_length:
            continue
        sample = reader(number)
        length = encoder.count_tokens(
            sample.text_input, sample.text_output, entry.input_sizes, len(sample.helper_images), sample.latent_sizes
        )
        if length > encoder.max_length:
            too_long[sample.key] = length
    if too_long:
        raise too_long_error(too_long, f"data.max_length={encoder.max_length}", folder)


def check_budget(folder: ShardFolder, lengths: npt.NDArray[np.int64], budget: int) -> None:
    """Compares every sample with the tokens that a packed row may have.

    Args:
        lengths: tokens of each sample, in the order of the index.

    Raises:
        DataError: some are longer; as `check_lengths`.
    """
    over = np.flatnonzero(lengths > budget).tolist()
    if over:
        index, names = load_index(folder), [shard.name for shard in folder.manifest.shards]
        too_long = {f"{names[index[number].shard]}/{index[number].key}": int(lengths[number]) for number in over}
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


def _most_tokens(encoder: Encoder, entry: IndexEntry) -> int:
    """No sample with this index entry has more tokens, without those of the template."""
    text = MAX_UTF8_BYTES * (entry.question_chars + entry.answer_chars)
    latents = sum(entry.block_sizes(encoder.latent_size)) + MARKERS * entry.latent_blocks
    return text + sum(encoder.image_tokens(entry.input_sizes)) + MARKERS * entry.image_blocks + latents
