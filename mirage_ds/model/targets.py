"""Builds the rollout's inputs from a micro-batch: image embeddings, latent targets, inputs_embeds."""

from typing import NamedTuple

import torch

from mirage_ds.batch import Batch
from mirage_ds.config import CompressStrategy
from mirage_ds.ops.latent_pool import latent_pool
from mirage_ds.ops.segments import batch_segments


class Tower(torch.nn.Module):
    """The vision tower with its merger; one ZeRO-3 leaf module, entered once per micro-step.

    A frozen tower stores no activations. The input of a trained one must require grad: ZeRO-3 releases a leaf module
    when the gradient of its input is computed.
    """

    def __init__(self, visual: torch.nn.Module, *, trained: bool) -> None:
        super().__init__()
        self.visual = visual
        self.trained = trained
        self.dtype = next(visual.parameters()).dtype

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches [P, 1176] and grids [N, 3] -> merged patch embeddings [P / 4, D], images in order, raster order."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.visual(pixel_values.to(self.dtype), grid_thw=image_grid_thw).pooler_output

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Input images' embeddings [image_rows, D] and helper images' embeddings [their patches, D].

        Both kinds are encoded together, so that every rank enters the tower once. Remaining embeddings are those of the
        dummy image of a micro-batch without images.
        """
        pixel_values = batch.pixel_values.requires_grad_(self.trained)
        patch_embeds = self(pixel_values, batch.image_grid_thw)
        num_input = len(batch.image_rows)
        num_helper = sum(rows * columns for rows, columns in batch.helper_grids)
        return patch_embeds[:num_input], patch_embeds[num_input : num_input + num_helper]


class LatentTargets(NamedTuple):
    """The pooled helper images of a micro-batch; M is 0 if there are none."""

    inputs: torch.Tensor  # [M, D] in the embeddings' dtype: the inputs at the latents
    targets: torch.Tensor  # [M, D] float32
    inverse_norms: torch.Tensor  # [M] float32: 1 / ||target||


def latent_targets(
    helper_embeds: torch.Tensor, batch: Batch, strategy: CompressStrategy, dtype: torch.dtype
) -> LatentTargets:
    """Pools the helper images' embeddings [their patches, D] to the inputs and targets of their latents."""
    segments = batch_segments(batch.helper_grids, batch.latent_sizes, strategy)
    if segments is None:
        empty = helper_embeds.new_zeros((0, helper_embeds.shape[1]), dtype=torch.float32)
        return LatentTargets(empty.to(dtype), empty, empty[:, 0])
    return LatentTargets(*latent_pool(helper_embeds, *segments, len(batch.latent_rows), dtype))


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
