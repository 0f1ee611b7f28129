"""From a micro-batch to the rollout's inputs: images through the tower, latent targets, inputs_embeds."""

import torch

from mirage_ds.batch import Batch
from mirage_ds.ops.latent_pool import latent_pool


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
        """Input images' embeddings [image_rows, D] and helper images' embeddings [sum of helper_patches, D].

        Both kinds go through together: one entry into the tower on every rank. What is left over is the dummy of a
        micro-batch without any image.
        """
        pixel_values = batch.pixel_values.requires_grad_(self.trained)
        patch_embeds = self(pixel_values, batch.image_grid_thw)
        num_input, num_helper = len(batch.image_rows), sum(batch.helper_patches)
        return patch_embeds[:num_input], patch_embeds[num_input : num_input + num_helper]


def latent_targets(helper_embeds: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Pools the helper images' embeddings to the targets of the micro-batch's latents [M, D] float32."""
    return latent_pool(helper_embeds, batch.helper_patches, batch.latent_sizes)


def build_inputs_embeds(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, targets: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Puts image and latent rows into the text embeddings, once and out of place.

    Out of place, so that the replaced rows, <|latent_pad|>'s among them, get exactly zero gradient.

    Args:
        text_embeds: [B, L, D].
        image_embeds: [image_rows, D].
        targets: [M, D] in stage 1, [0, D] where the latents are fed back.

    Returns:
        [B, L, D].
    """
    rows = torch.cat([batch.image_rows, batch.latent_rows[: len(targets)]])
    values = torch.cat([image_embeds.to(text_embeds.dtype), targets.to(text_embeds.dtype)])
    return text_embeds.flatten(0, 1).index_copy(0, rows, values).view_as(text_embeds)
