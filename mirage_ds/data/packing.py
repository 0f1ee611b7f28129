"""Packs encoded samples into one row, one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from mirage_ds.batch import Batch
from mirage_ds.data.collate import lay_out
from mirage_ds.data.encode import EncodedSample


def collate_packed(samples: Sequence[EncodedSample]) -> Batch:
    """The samples as one row of a Batch: [1, sum of their lengths].

    Each keeps its own positions and the weights of its losses. `Batch.sample_ends` says where each one ends, so that
    the model's attention does not cross from one to another.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    ends = list(accumulate(lengths))
    places = [torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return replace(lay_out(samples, places, (1, ends[-1])), sample_ends=torch.tensor(ends, dtype=torch.int32))
