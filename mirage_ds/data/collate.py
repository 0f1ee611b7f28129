"""Collates encoded samples to a Batch: padding, alignment of latents, positions of images, latents and targets."""

from collections.abc import Sequence

import torch

from mirage_ds.batch import CELL_PATCHES, MERGE_SIZE, Batch, Grid
from mirage_ds.data.encode import EncodedSample
from mirage_ds.tokens import IGNORE_INDEX

# A micro-batch without any image still enters the tower, with one all-zero merged patch that is not used.
DUMMY_GRID = (1, 1)


def collate(samples: Sequence[EncodedSample], *, align_latents: bool) -> Batch:
    """Pads the samples of one micro-batch to the rows of a Batch.

    Args:
        samples: B of them.
        align_latents: pad on the left so that all latent blocks start in one column, which keeps the passes of stage 2
            at K + 1; otherwise rows start at column 0 and are padded only on the right.
    """
    leads = [_lead(sample) if align_latents else 0 for sample in samples]
    starts = [max(leads) - lead for lead in leads]
    ends = [start + len(sample.input_ids) for start, sample in zip(starts, samples, strict=True)]
    shape = (len(samples), max(ends))
    bounds = enumerate(zip(starts, ends, strict=True))
    places = torch.cat([torch.arange(row * shape[1] + start, row * shape[1] + end) for row, (start, end) in bounds])

    def lay_out(rows: Sequence[torch.Tensor], fill: int | bool) -> torch.Tensor:
        """[..., tokens] of each sample -> [..., B, L]."""
        tokens = torch.cat(list(rows), dim=-1)
        laid = tokens.new_full((*tokens.shape[:-1], shape[0] * shape[1]), fill)
        laid[..., places] = tokens
        return laid.unflatten(-1, shape)

    latent_mask = lay_out([sample.latent_mask for sample in samples], False)
    labels = lay_out([sample.labels for sample in samples], IGNORE_INDEX)
    # A token is predicted by the output one position before it, so the first column has no prediction.
    supervised = labels[:, 1:] != IGNORE_INDEX
    target_rows = _flat(torch.nn.functional.pad(supervised, (0, 1)))
    target_ids = labels[:, 1:][supervised]
    target_weights = _row_means(supervised)
    if not len(target_rows):  # the loss head is still entered, with weight 0
        target_rows, target_ids, target_weights = torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1)

    cached = [sample.cached_targets for sample in samples if sample.cached_targets is not None]
    has_cached = torch.tensor([sample.cached_targets is not None for sample in samples])
    is_cached = has_cached[:, None].expand_as(latent_mask)[latent_mask]

    pixels = [sample.pixel_values for sample in samples] + [sample.pixel_values_latent for sample in samples]
    pixel_values = torch.cat(pixels)
    input_grids = _merged([sample.image_grid_thw for sample in samples])
    helper_grids = _merged([sample.image_grid_thw_latent for sample in samples])
    image_grids = input_grids + helper_grids
    if not image_grids:
        image_grids = [DUMMY_GRID]
        pixel_values = pixel_values.new_zeros((CELL_PATCHES, pixel_values.shape[1]))

    return Batch(
        input_ids=lay_out([sample.input_ids for sample in samples], 0),
        position_ids=lay_out([sample.position_ids for sample in samples], 0),
        attention_mask=lay_out([torch.ones_like(sample.latent_mask) for sample in samples], False),
        left_padded=any(starts),
        latent_mask=latent_mask,
        latent_columns=latent_mask.any(dim=0).nonzero().flatten().tolist(),
        image_rows=_flat(lay_out([sample.image_mask for sample in samples], False)),
        latent_rows=_flat(latent_mask),
        latent_weights=_row_means(latent_mask),
        target_rows=target_rows,
        target_ids=target_ids,
        target_weights=target_weights,
        pixel_values=pixel_values,
        image_grids=image_grids,
        helper_grids=helper_grids,
        latent_sizes=[sample.latent_size for sample in samples for _ in sample.image_grid_thw_latent],
        target_slots=[slot for sample in samples for slot in sample.target_slots],
        cached_targets=torch.cat(cached) if cached else torch.zeros(0, 1),
        latent_order=is_cached.argsort(stable=True).argsort(),
        num_grounded_samples=len(cached) + sum(len(sample.image_grid_thw_latent) > 0 for sample in samples),
        row_tokens=[len(sample.input_ids) for sample in samples],
        keys=[sample.key for sample in samples],
        faults=[fault for sample in samples for fault in sample.faults],
    )


def _merged(grids: list[torch.Tensor]) -> list[Grid]:
    """Grids [n, 3] of each sample, in patches -> those of all, in merged patches."""
    return [(rows // MERGE_SIZE, columns // MERGE_SIZE) for _, rows, columns in torch.cat(grids).tolist()]


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
