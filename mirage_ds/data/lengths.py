"""Finds samples that are longer than `data.max_length` or `data.token_budget` before a run, without decoding an image.

Counted tokens (`mirage-data count`) give each length. Without them the index bounds it, and only texts that may be too
long are read and tokenized.
"""

from collections.abc import Iterator

import numpy as np

from mirage_ds.data.columns import Entries, Index, parts_of
from mirage_ds.data.costs import MARKERS, SampleCosts, row_sizes
from mirage_ds.data.counts import counts_name, load_counts
from mirage_ds.data.encode import Encoder
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.ragged import Numbers
from mirage_ds.data.reasons import Reason
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError

MAX_UTF8_BYTES = 4  # of a character; a token of byte-level BPE has at least one byte


def too_long(encoder: Encoder, folder: ShardFolder, helpers: Helpers) -> Reason:
    """The samples with more tokens than the encoder's limit, if it has one.

    Raises:
        DataError: a sample, or the counted tokens, cannot be read.
    """
    limit, helpers = encoder.max_length, helpers.of_texts()
    if limit is None:
        return Reason("", "")
    index = helpers.index(folder)
    name = counts_name(encoder.tokenizer, system_turn=encoder.system_turn)
    counts = load_counts(name, folder, stage="text" if helpers.images == "none" else encoder.stage)
    if counts is None:
        lengths = _read_lengths(encoder, folder, helpers, index, limit)
    else:
        costs = SampleCosts(index, encoder.image_tokens, encoder.stage, encoder.latent_size, texts=counts)
        lengths = ((numbers, costs.of(numbers).tokens) for numbers in parts_of(len(index)))
    return _longer(lengths, index, folder, "data.max_length", limit)


def check_budget(folder: ShardFolder, costs: SampleCosts, budget: int) -> None:
    """Compares every sample with the tokens that a packed row may have.

    Raises:
        DataError: some are longer; the message has how many, and the first few with their lengths.
    """
    lengths = ((numbers, costs.of(numbers).tokens) for numbers in parts_of(len(costs.index)))
    if reason := _longer(lengths, costs.index, folder, "data.token_budget", budget):
        raise DataError(f"the run cannot use samples ({folder.place}, samples: {folder.num_samples}):\n  - {reason}")


def _longer(
    lengths: Iterator[tuple[Numbers, Numbers]], index: Entries, folder: ShardFolder, key: str, limit: int
) -> Reason:
    """Args: lengths: numbers of samples, and the tokens of each; key: of the recipe, which has the limit."""
    reason, longest = Reason(f"more tokens than {key}={limit}", ""), 0
    for numbers, tokens in lengths:
        over = np.flatnonzero(tokens > limit)
        listed = over[: reason.num_missing]
        for entry, length in zip(index.take(numbers[listed]).entries(), tokens[listed].tolist(), strict=True):
            reason.examples.append(f"{folder.manifest.shards[entry.shard].name}/{entry.key} with {length}")
        reason.count += len(over)
        longest = max(longest, int(tokens[over].max(initial=0)))
    reason.remedy = (
        f"samples are never truncated; raise {key} to at least {longest}, make the images smaller with "
        "data.max_pixels, or leave these rows out with `mirage-data filter`"
    )
    return reason


def _read_lengths(
    encoder: Encoder, folder: ShardFolder, helpers: Helpers, index: Entries, limit: int
) -> Iterator[tuple[Numbers, Numbers]]:
    """Numbers and tokens of the samples that may have more than `limit`."""
    reader = SampleReader(folder, helpers=helpers)
    template = encoder.count_tokens(Sample("", "", ""), [])
    for numbers in parts_of(len(index)):
        part = index.take(numbers)
        near = np.flatnonzero(template + _most_tokens(encoder, part) > limit)
        tokens = [
            encoder.count_tokens(sample, entry.input_sizes)
            for entry, sample in zip(part.take(near).entries(), map(reader, numbers[near].tolist()), strict=True)
        ]
        yield numbers[near], np.array(tokens, np.int64)


def _most_tokens(encoder: Encoder, index: Index) -> Numbers:
    """[n]: none of these samples has more tokens, without those of the template."""
    samples = index.samples
    sizes = row_sizes(index, encoder.image_tokens, "stage1", encoder.latent_size)
    text = MAX_UTF8_BYTES * (samples["question_chars"].astype(np.int64) + samples["answer_chars"])
    markers = MARKERS * (samples["input_images"].astype(np.int64) + samples["latent_blocks"])
    return text + sizes.pads + markers
