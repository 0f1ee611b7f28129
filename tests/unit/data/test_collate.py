"""collate: alignment, padding, positions and weights, against the masks and labels of each sample."""

import torch
from random_samples import ragged_batch, random_sample

from mirage_ds.data.collate import collate


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
            assert torch.equal(flat[batch.target_rows[targets] + 1], supervised)
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


def test_nothing_to_see_or_to_predict_still_enters_every_unit() -> None:
    sample = random_sample(1, stage="stage2", images=0, latents=False, labels=False)
    batch = collate([sample], align_latents=True)
    assert batch.image_grids == [(1, 1)]
    assert batch.pixel_values.shape == (4, 1176)
    assert not batch.pixel_values.any()
    assert not len(batch.image_rows)
    assert batch.target_weights.tolist() == [0.0]
    assert batch.latent_columns == []
