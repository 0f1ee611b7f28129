"""collate: alignment, padding, positions and weights, against the masks and labels of each sample."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_samples import END, START, ragged_batch, random_sample

from mirage_ds.batch import Batch
from mirage_ds.data.alignment import aligned_columns, columns_from_left, cost
from mirage_ds.data.collate import collate, lay_out
from mirage_ds.data.costs import PASS_TOKENS
from mirage_ds.data.encode import EncodedSample

blocks_of_rows = st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5)


def test_rows_keep_their_contents_and_their_positions() -> None:
    """The flat positions of every row point to its own images, latents and targets."""
    samples = ragged_batch(3, 5, stage="stage1")
    for align_latents in (False, True):
        batch = collate(samples, align_latents=align_latents)
        length = batch.input_ids.shape[1]
        flat = batch.input_ids.flatten()
        for row, sample in enumerate(samples):
            kept = batch.attention_mask[row]
            assert torch.equal(batch.input_ids[row][kept], sample.input_ids)
            assert torch.equal(batch.position_ids[:, row][:, kept], sample.position_ids)
            assert torch.equal(batch.latent_mask[row][kept], sample.latent_mask)
            if not align_latents:
                assert kept[: len(sample.input_ids)].all()
            in_row = batch.image_rows // length == row
            assert torch.equal(flat[batch.image_rows[in_row]], sample.input_ids[sample.image_mask])
            targets = batch.target_rows // length == row
            supervised = sample.labels[sample.labels != -100]
            assert torch.equal(batch.target_ids[targets], supervised)
            places = row * length + kept.nonzero().flatten()  # a gap may lie between a token and the one before it
            following = places[torch.searchsorted(places, batch.target_rows[targets]) + 1]
            assert torch.equal(flat[following], supervised)
            for weights in (batch.target_weights[targets], batch.latent_weights[batch.latent_rows // length == row]):
                assert not len(weights) or abs(weights.sum().item() - 1) < 1e-6
        assert batch.num_tokens == sum(len(sample.input_ids) for sample in samples)


def test_latents_start_in_one_column() -> None:
    """So that K + 1 passes are enough for rows of any length; blocks of another K end in another column."""
    samples = ragged_batch(1, 4, stage="stage2", latent_sizes=[2, 5, 5, 3])
    batch = collate(samples, align_latents=True)
    first = batch.latent_mask.int().argmax(dim=1)
    assert len(set(first.tolist())) == 1
    assert batch.latent_columns == list(range(int(first[0]), int(first[0]) + 5))


def batch_of(samples: list[EncodedSample], columns: list[torch.Tensor]) -> Batch:
    length = max(int(each[-1]) for each in columns) + 1
    places = [row * length + each for row, each in enumerate(columns)]
    return lay_out(samples, places, (len(samples), length))


@given(st.integers(0, 10**6), blocks_of_rows)
def test_blocks_of_the_same_ordinal_start_in_one_column(seed: int, blocks: Sequence[Sequence[int]]) -> None:
    """Every row keeps its tokens in their order. Markers stay beside their block where a state is fed back: the token
    before a latent is the one that the sample has there."""
    samples = ragged_batch(seed, len(blocks), stage="stage2", latent_sizes=blocks)
    batch = batch_of(samples, aligned_columns(samples))
    starts = [[] for _ in range(3)]
    for row, sample in enumerate(samples):
        kept = batch.attention_mask[row]
        assert torch.equal(batch.input_ids[row][kept], sample.input_ids)
        assert torch.equal(batch.latent_mask[row][kept], sample.latent_mask)
        for ordinal, column in enumerate((batch.input_ids[row] == START).nonzero().flatten().tolist()):
            starts[ordinal].append(column + 1)
        if not sample.latent_sizes:
            starts[0].append(int(kept.nonzero()[sample.prompt_length - 1]) + 1)
        last_end = (batch.input_ids[row] == END).nonzero().flatten().tolist()[-1:]
        assert not last_end or kept[last_end[0] : last_end[0] + 3].all(), "after the last block a row has no gap"
    assert all(len(set(columns)) <= 1 for columns in starts)
    before = batch.input_ids.flatten()[batch.latent_rows - 1]
    assert torch.equal(before, torch.cat([sample.input_ids[:-1][sample.latent_mask[1:]] for sample in samples]))
    largest = [max((sizes[n] for sizes in blocks if n < len(sizes)), default=0) for n in range(3)]
    assert len(batch.latent_columns) <= sum(largest)
    assert batch.attention_mask.any(dim=0).all(), "each column has a token"


def longer(sample: EncodedSample, place: int, tokens: int) -> EncodedSample:
    """The sample with more text, that many times the token at `place`."""
    columns = torch.arange(len(sample.input_ids))
    columns = torch.cat([columns[:place], columns[place].expand(tokens), columns[place:]])
    names = ("input_ids", "labels", "position_ids", "latent_mask", "image_mask")
    return replace(sample, **{name: getattr(sample, name)[..., columns] for name in names})


@pytest.mark.parametrize(("tokens", "aligned"), [(0, True), (60, True), (2000, False)])
def test_the_way_that_costs_less_is_taken(tokens: int, aligned: bool) -> None:
    """The second of three rows begins its block late, the third ends late: aligned, all rows have both lengths."""
    samples = ragged_batch(4, 3, stage="stage2", latent_sizes=[4, 4, 4])
    samples[1] = longer(samples[1], samples[1].prompt_length, tokens)
    samples[2] = longer(samples[2], len(samples[2].input_ids) - 1, tokens)
    batch = collate(samples, align_latents=True)
    passes = 1 + len(batch.latent_columns)
    assert (passes == 5) == aligned == batch.left_padded
    other = columns_from_left(samples) if aligned else aligned_columns(samples)
    assert batch.input_ids.numel() + PASS_TOKENS * passes < cost(samples, other)


def test_prompts_end_in_one_column() -> None:
    """What decoding relies on; both ways cost the same there, whatever a pass costs."""
    prompts = [random_sample(seed, stage="text", images=seed % 3) for seed in range(5)]
    for prompt in prompts:
        prompt.prompt_length = len(prompt.input_ids)
    batch = collate(prompts, align_latents=True)
    assert batch.attention_mask[:, -1].all()
    assert batch.input_ids.shape[1] == max(len(prompt.input_ids) for prompt in prompts)
    assert cost(prompts, columns_from_left(prompts)) == cost(prompts, aligned_columns(prompts))


def test_nothing_to_see_or_to_predict_still_enters_every_unit() -> None:
    sample = random_sample(1, stage="stage2", images=0, latents=False, labels=False)
    batch = collate([sample], align_latents=True)
    assert batch.image_grids == [(1, 1)]
    assert batch.pixel_values.shape == (4, 588)
    assert not batch.pixel_values.any()
    assert not len(batch.image_rows)
    assert batch.target_weights.tolist() == [0.0]
    assert batch.latent_columns == []
