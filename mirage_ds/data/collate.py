"""Collates encoded samples to a Batch: padding, alignment of latents, positions of images, latents and targets."""

from collections.abc import Sequence

import torch

from mirage_ds.batch import Batch
from mirage_ds.data.encode import EncodedSample
from mirage_ds.tokens import IGNORE_INDEX

# A micro-batch without any image still enters the tower, with one all-zero merged patch that is not used.
DUMMY_GRID = torch.tensor([[1, 2, 2]])


def collate(samples: Sequence[EncodedSample], *, align_latents: bool, merge_size: int = 2) -> Batch:
    """Pads the samples of one micro-batch to the rows of a Batch.

    Args:
        samples: B of them.
        align_latents: pad on the left so that all latent blocks start in one column, which keeps the passes of stage 2
            at K + 1; otherwise rows start at column 0 and are padded only on the right.
        merge_size: the tower merges merge_size squared patches into one embedding.
    """
    leads = [_lead(sample) if align_latents else 0 for sample in samples]
    starts = [max(leads) - lead for lead in leads]
    length = max(start + len(sample.input_ids) for start, sample in zip(starts, samples, strict=True))

    def lay_out(rows: Sequence[torch.Tensor], fill: int | bool) -> torch.Tensor:
        laid = rows[0].new_full((len(rows), length), fill)
        for target, start, row in zip(laid, starts, rows, strict=True):
            target[start : start + len(row)] = row
        return laid

    latent_mask = lay_out([sample.latent_mask for sample in samples], False)
    labels = lay_out([sample.labels for sample in samples], IGNORE_INDEX)
    # A token is predicted by the output one position before it, so the first column has no prediction.
    supervised = labels[:, 1:] != IGNORE_INDEX
    target_rows = _flat(torch.nn.functional.pad(supervised, (0, 1)))
    target_ids = labels[:, 1:][supervised]
    target_weights = _row_means(supervised)
    if not len(target_rows):  # the loss head is still entered, with weight 0
        target_rows, target_ids, target_weights = torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1)

    grids = [sample.image_grid_thw for sample in samples] + [sample.image_grid_thw_latent for sample in samples]
    pixels = [sample.pixel_values for sample in samples] + [sample.pixel_values_latent for sample in samples]
    image_grid_thw, pixel_values = torch.cat(grids), torch.cat(pixels)
    if not len(image_grid_thw):
        image_grid_thw = DUMMY_GRID
        pixel_values = pixel_values.new_zeros((int(DUMMY_GRID.prod()), pixel_values.shape[1]))
    helper_grids = torch.cat([sample.image_grid_thw_latent for sample in samples]) // merge_size

    return Batch(
        input_ids=lay_out([sample.input_ids for sample in samples], 0),
        position_ids=torch.stack([lay_out([sample.position_ids[axis] for sample in samples], 0) for axis in range(3)]),
        attention_mask=lay_out([torch.ones_like(sample.latent_mask) for sample in samples], False),
        latent_mask=latent_mask,
        latent_columns=latent_mask.any(dim=0).nonzero().flatten().tolist(),
        image_rows=_flat(lay_out([sample.image_mask for sample in samples], False)),
        latent_rows=_flat(latent_mask),
        latent_weights=_row_means(latent_mask),
        target_rows=target_rows,
        target_ids=target_ids,
        target_weights=target_weights,
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw,
        helper_grids=[(rows, columns) for _, rows, columns in helper_grids.tolist()],
        latent_sizes=[sample.latent_size for sample in samples for _ in sample.image_grid_thw_latent],
        num_grounded_samples=sum(len(sample.image_grid_thw_latent) > 0 for sample in samples),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        keys=[sample.key for sample in samples],
    )


def _lead(sample: EncodedSample) -> int:
    """Columns of a row before its latents, or the prompt's length for a row without latents."""
    latents = sample.latent_mask.nonzero()
    return int(latents[0]) if len(latents) else sample.prompt_length


def _flat(mask: torch.Tensor) -> torch.Tensor:
    """[B, L] -> positions of the True entries in the flattened sequence."""
    return mask.flatten().nonzero().flatten()


def _row_means(mask: torch.Tensor) -> torch.Tensor:
    """For each True entry of [B, L], 1 / (True entries of its row): the weights of a mean."""
    return (1.0 / mask.sum(dim=1, keepdim=True)).expand_as(mask)[mask]
