"""Collates encoded samples to a Batch: padding, positions of images, latents and targets, weights of the losses."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from mirage_ds.batch import Batch
from mirage_ds.data.alignment import cheapest_columns, columns_from_left, hide_column, num_columns
from mirage_ds.data.encode import EncodedSample
from mirage_ds.patch_grid import CELL_PATCHES, MERGE_SIZE, Grid
from mirage_ds.tokens import IGNORE_INDEX

# A micro-batch without any image still enters the tower, with one black merged patch that is not used.
DUMMY_GRID = (1, 1)


def collate(samples: Sequence[EncodedSample], *, align_latents: bool) -> Batch:
    """Pads the samples of one micro-batch to the rows of a Batch.

    Args:
        samples: B of them.
        align_latents: let latent blocks of several rows share columns where that costs less, for the passes of stage 2;
            otherwise rows start at column 0.
    """
    columns = cheapest_columns(samples) if align_latents else columns_from_left(samples)
    length = num_columns(columns)
    places = [row * length + each for row, each in enumerate(columns)]
    batch = lay_out(samples, places, (len(samples), length))
    hidden_from = [hide_column(*row) for row in zip(samples, columns, strict=True)]
    if hidden_from == [None] * len(samples):
        return batch
    return replace(
        batch,
        hidden_from=torch.tensor([length if column is None else column for column in hidden_from]),
        hide_columns=sorted({column for column in hidden_from if column is not None and column < length}),
    )


def lay_out(samples: Sequence[EncodedSample], places: Sequence[torch.Tensor], shape: tuple[int, int]) -> Batch:
    """A Batch of these rows and columns.

    Args:
        places: flat positions in [B * L] of each sample's tokens, ascending; all others are padding. A latent must
            directly follow the token before it, whose output it is, or predicts it.
        shape: B, L.
    """
    place = torch.cat(list(places))

    def laid(tokens: Sequence[torch.Tensor], fill: int | bool) -> torch.Tensor:
        """[..., tokens] of each sample -> [..., B, L]."""
        joined = torch.cat(list(tokens), dim=-1)
        flat = joined.new_full((*joined.shape[:-1], shape[0] * shape[1]), fill)
        flat[..., place] = joined
        return flat.unflatten(-1, shape)

    # A token is predicted by the output at the token before it in its sample, so a first one has no prediction.
    supervised = [each.labels[1:] != IGNORE_INDEX for each in samples]
    target_rows = _join(columns[:-1][mask] for columns, mask in zip(places, supervised, strict=True))
    target_ids = _join(each.labels[1:][mask] for each, mask in zip(samples, supervised, strict=True))
    target_weights = _means(supervised)
    if not len(target_rows):  # the loss head is still entered, with weight 0
        target_rows, target_ids, target_weights = torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1)

    latents = [each.latent_mask for each in samples]
    latent_mask = laid(latents, False)
    cached = [sample.cached_targets for sample in samples if sample.cached_targets is not None]
    has_cached = [each.cached_targets is not None for each in samples]
    is_cached = _join(mask[mask] & known for mask, known in zip(latents, has_cached, strict=True))

    pixel_values = torch.cat([each.pixel_values for each in samples] + [each.pixel_values_latent for each in samples])
    input_grids = _merged([sample.image_grid_thw for sample in samples])
    helper_grids = _merged([sample.image_grid_thw_latent for sample in samples])
    image_grids = input_grids + helper_grids
    if not image_grids:
        image_grids = [DUMMY_GRID]
        pixel_values = pixel_values.new_zeros((CELL_PATCHES, pixel_values.shape[1]))

    is_token = laid([torch.ones_like(each.latent_mask) for each in samples], False)
    return Batch(
        input_ids=laid([sample.input_ids for sample in samples], 0),
        position_ids=laid([sample.position_ids for sample in samples], 0),
        attention_mask=is_token,
        left_padded=bool((is_token[:, 1:] & ~is_token[:, :-1]).any()),
        latent_mask=latent_mask,
        most_latents=int(latent_mask.sum(dim=1).max()),
        latent_columns=latent_mask.any(dim=0).nonzero().flatten().tolist(),
        image_rows=_join(columns[each.image_mask] for columns, each in zip(places, samples, strict=True)),
        latent_rows=_join(columns[mask] for columns, mask in zip(places, latents, strict=True)),
        latent_weights=_means(latents),
        target_rows=target_rows,
        target_ids=target_ids,
        target_weights=target_weights,
        pixel_values=pixel_values,
        pixel_levels=samples[0].pixel_levels,  # of one encoder, as in all samples
        image_grids=image_grids,
        helper_grids=helper_grids,
        latent_sizes=[size for sample in samples if len(sample.image_grid_thw_latent) for size in sample.latent_sizes],
        target_slots=[slot for sample in samples for slot in sample.target_slots],
        cached_targets=torch.cat(cached) if cached else torch.zeros(0, 1),
        latent_order=is_cached.argsort(stable=True).argsort(),
        num_grounded_samples=len(cached) + sum(len(sample.image_grid_thw_latent) > 0 for sample in samples),
        sample_tokens=[len(sample.input_ids) for sample in samples],
        keys=[sample.key for sample in samples],
        sample_sets=torch.tensor([sample.set_number for sample in samples]),
        faults=[fault for sample in samples for fault in sample.faults],
    )


def _merged(grids: list[torch.Tensor]) -> list[Grid]:
    """Grids [n, 3] of each sample, in patches -> those of all, in merged patches."""
    return [(rows // MERGE_SIZE, columns // MERGE_SIZE) for _, rows, columns in torch.cat(grids).tolist()]


def _join(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """What each sample has, one after the other."""
    return torch.cat(list(parts))


def _means(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each True entry of each sample's mask, 1 / (True entries of that mask): the weights of a mean."""
    return torch.cat([(1.0 / mask.sum()).expand(int(mask.sum())) for mask in masks])
