"""Builds the rollout's inputs from embeddings of images: latent targets, inputs_embeds."""

from typing import NamedTuple

import torch

from mirage_ds.batch import Batch
from mirage_ds.config import CompressStrategy
from mirage_ds.ops.latent_pool import latent_pool
from mirage_ds.ops.segments import batch_segments


class LatentTargets(NamedTuple):
    """The pooled helper images of a micro-batch; M is 0 if there are none."""

    inputs: torch.Tensor  # [M, D] in the embeddings' dtype: the inputs at the latents
    targets: torch.Tensor  # [M, D] float32
    inverse_norms: torch.Tensor  # [M] float32: 1 / ||target||


def latent_targets(
    helper_embeds: torch.Tensor, batch: Batch, strategy: CompressStrategy, dtype: torch.dtype
) -> LatentTargets:
    """Pools the helper images' embeddings [their patches, D] to the inputs and targets of their M - C latents."""
    segments = batch_segments(batch.helper_grids, batch.latent_sizes, strategy)
    if segments is None:
        empty = helper_embeds.new_zeros((0, helper_embeds.shape[1]), dtype=torch.float32)
        return LatentTargets(empty.to(dtype), empty, empty[:, 0])
    num_pooled = len(batch.latent_rows) - len(batch.cached_targets)
    return LatentTargets(*latent_pool(helper_embeds, *segments, num_pooled, dtype))


def add_cached(pooled: LatentTargets, batch: Batch) -> LatentTargets:
    """Adds the targets of helper images that were not encoded, so that all are in the order of the latents.

    They are what `latent_pool` returned once, and its inputs are its targets in another dtype: no bit differs.
    """
    if not len(batch.cached_targets):
        return pooled
    cached = batch.cached_targets[:, :-1]
    return LatentTargets(
        torch.cat([pooled.inputs, cached.to(pooled.inputs.dtype)])[batch.latent_order],
        torch.cat([pooled.targets, cached])[batch.latent_order],
        torch.cat([pooled.inverse_norms, batch.cached_targets[:, -1]])[batch.latent_order],
    )


def build_inputs_embeds(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, latent_inputs: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Replaces rows of the text embeddings by image and latent rows, in one out-of-place operation.

    Out of place, so that the replaced rows, including those of <|latent_pad|>, get exactly zero gradient.

    Args:
        text_embeds: [B, L, D].
        image_embeds: [image_rows, D].
        latent_inputs: [M, D] in stage 1, [0, D] where the latents are fed back.

    Returns:
        [B, L, D].
    """
    rows = torch.cat([batch.image_rows, batch.latent_rows[: len(latent_inputs)]])
    values = torch.cat([image_embeds.to(text_embeds.dtype), latent_inputs.to(text_embeds.dtype)])
    return text_embeds.flatten(0, 1).index_copy(0, rows, values).view_as(text_embeds)
