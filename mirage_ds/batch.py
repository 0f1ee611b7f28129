"""Batch: every tensor that crosses from data to model. The two sides meet only here.

Shape legend: B rows, L columns, P patches, N images, T supervised tokens, K latents per block, M latents in all.
"""

from dataclasses import dataclass, fields

import torch


@dataclass
class Batch:
    """One micro-batch of one rank.

    Rows are padded left so that their latent blocks start in one column (stage 2) and right to one length. Positions
    in the flattened [B * L] sequence say where images, latents and targets sit; the model needs no token ids for that.
    """

    input_ids: torch.Tensor  # [B, L] int64
    position_ids: torch.Tensor  # [3, B, L] int64: time, height, width of each token
    attention_mask: torch.Tensor  # [B, L] bool: False at padding
    latent_mask: torch.Tensor  # [B, L] bool: True at <|latent_pad|>
    image_rows: torch.Tensor  # [merged P] int64: flat places of the input images' embeddings, in image order
    latent_rows: torch.Tensor  # [M] int64: flat places of the latents
    latent_row_sample: torch.Tensor  # [M] int64: row of each latent
    target_rows: torch.Tensor  # [T] int64: flat places whose output predicts a supervised token
    target_ids: torch.Tensor  # [T] int64: that token
    target_row_sample: torch.Tensor  # [T] int64: row of each supervised token
    pixel_values: torch.Tensor  # [P, 1176] float32: patches of all input images, then of all helper images
    image_grid_thw: torch.Tensor  # [N, 3] int64, input images first
    num_input_images: int
    latent_sizes: list[int]  # K of each helper image (stage 1); empty where no helper image is encoded
    keys: list[str]  # [B] where each row came from, for messages

    def to(self, device: torch.device | str) -> "Batch":
        """Moves every tensor; copies are asynchronous where the memory is pinned."""
        moved = {
            field.name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return Batch(**moved)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader's pinning thread."""
        pinned = {
            field.name: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }
        return Batch(**pinned)
