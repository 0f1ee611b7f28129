"""collate_packed: samples keep their tokens, positions, targets and weights; nothing is predicted across them."""

import torch
from random_samples import ragged_batch

from mirage_ds.data.collate import collate
from mirage_ds.data.packing import collate_packed


def test_samples_follow_each_other_in_one_row() -> None:
    samples = ragged_batch(3, 5, stage="stage1")
    batch = collate_packed(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert batch.input_ids.shape == (1, sum(lengths))
    assert batch.attention_mask.all()
    assert not batch.left_padded
    assert batch.sample_tokens == lengths
    assert batch.sample_ends.dtype == torch.int32
    assert batch.sample_ends.tolist() == torch.tensor(lengths).cumsum(0).tolist()
    for sample, ids, positions in zip(
        samples, batch.input_ids[0].split(lengths), batch.position_ids[:, 0].split(lengths, dim=1), strict=True
    ):
        assert torch.equal(ids, sample.input_ids)
        assert torch.equal(positions, sample.position_ids)


def test_targets_and_weights_are_those_of_unpacked_rows() -> None:
    samples = ragged_batch(5, 6, stage="stage1")
    packed, rows = collate_packed(samples), collate(samples, align_latents=False)
    for name in ("target_ids", "target_weights", "latent_weights", "pixel_values", "latent_order"):
        assert torch.equal(getattr(packed, name), getattr(rows, name)), name
    flat, ends = packed.input_ids.flatten(), set(packed.sample_ends.tolist())
    assert torch.equal(flat[packed.target_rows + 1], packed.target_ids)
    assert not {place + 1 for place in packed.target_rows.tolist()} & ends, "a sample predicts the next one's start"
    assert torch.equal(flat[packed.latent_rows], rows.input_ids.flatten()[rows.latent_rows])
    assert packed.num_grounded_samples == rows.num_grounded_samples
    assert packed.keys == rows.keys
