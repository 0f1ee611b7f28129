"""From a micro-batch to the rollout's inputs: images through the tower, latent targets, inputs_embeds."""

from typing import NamedTuple

import torch

from mirage_ds.batch import Batch
from mirage_ds.config import CompressStrategy
from mirage_ds.ops.latent_pool import latent_pool
from mirage_ds.ops.segments import batch_segments


class Tower(torch.nn.Module):
    """The vision tower with its merger; one ZeRO-3 leaf module, entered once per micro-step.

    Frozen, it keeps no activations. Trained, its input has to require grad: ZeRO-3 releases a leaf module when the
    gradient of its input is there.
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

        Both kinds go through together: one entry into the tower on every rank. What is left over is the dummy of a
        micro-batch without any image.
        """
        pixel_values = batch.pixel_values.requires_grad_(self.trained)
        patch_embeds = self(pixel_values, batch.image_grid_thw)
        num_input = len(batch.image_rows)
        num_helper = sum(rows * columns for rows, columns in batch.helper_grids)
        return patch_embeds[:num_input], patch_embeds[num_input : num_input + num_helper]


class LatentTargets(NamedTuple):
    """What the helper images of a micro-batch become; M is 0 where there are none."""

    inputs: torch.Tensor  # [M, D] in the embeddings' dtype: fed at the latents
    targets: torch.Tensor  # [M, D] float32
    inverse_norms: torch.Tensor  # [M] float32: 1 / ||target||


def latent_targets(
    helper_embeds: torch.Tensor, batch: Batch, strategy: CompressStrategy, dtype: torch.dtype
) -> LatentTargets:
    """Pools the helper images' embeddings [their patches, D] to what their latents are fed and compared with."""
    segments = batch_segments(batch.helper_grids, batch.latent_sizes, strategy)
    if segments is None:
        nothing = helper_embeds.new_zeros((0, helper_embeds.shape[1]), dtype=torch.float32)
        return LatentTargets(nothing.to(dtype), nothing, nothing[:, 0])
    return LatentTargets(*latent_pool(helper_embeds, *segments, len(batch.latent_rows), dtype))


def build_inputs_embeds(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, latent_inputs: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Puts image and latent rows into the text embeddings, once and out of place.

    Out of place, so that the replaced rows, <|latent_pad|>'s among them, get exactly zero gradient.

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
