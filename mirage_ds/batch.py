"""Batch: all tensors that the data side passes to the model; the only interface between the two.

Shape legend: B rows, L columns, S samples (B of them, unless rows are packed), P patches, N images,
T supervised tokens, K latents per block, M latents in all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from mirage_ds.patch_grid import Grid


@dataclass
class Batch:
    """One micro-batch of one rank.

    Rows are padded to one length: on the right, and in stage 2 also before their blocks, which then start in the same
    columns; or they are packed: S samples share one row, without padding. Positions in the flattened [B * L] sequence
    locate images, latents and targets, so the model needs no token ids for that. The position before a latent is that
    of the token before it.
    """

    input_ids: torch.Tensor  # [B, L] int64
    position_ids: torch.Tensor  # [3, B, L] int64: time, height, width of each token
    attention_mask: torch.Tensor  # [B, L] bool: False at padding
    left_padded: bool  # whether any row has padding before one of its tokens
    latent_mask: torch.Tensor  # [B, L] bool: True at <|latent_pad|>
    most_latents: int  # of a row
    latent_columns: list[int]  # columns in which any row has a latent, ascending
    image_rows: torch.Tensor  # [merged patches of input images] int64: flat positions of their embeddings, in order
    latent_rows: torch.Tensor  # [M] int64: flat positions of the latents
    latent_weights: torch.Tensor  # [M] float32: 1 / (latents of the sample)
    target_rows: torch.Tensor  # [T] int64: flat positions whose output predicts a supervised token; T >= 1
    target_ids: torch.Tensor  # [T] int64: that token
    target_weights: torch.Tensor  # [T] float32: 1 / (supervised tokens of the sample); 0 for a dummy
    pixel_values: torch.Tensor  # [P, 588] uint8: patches of all input images, then of all helper images; P >= 4
    pixel_levels: torch.Tensor  # [3, 256] float32: what the tower takes for each byte of a color, see `EncodedSample`
    image_grids: list[Grid]  # [N], input images first
    helper_grids: list[Grid]  # of the helper images (stage 1), else empty
    latent_sizes: list[int]  # K of each of the helper images
    target_slots: list[int]  # of each helper image, where the target cache keeps its targets; empty without a cache
    cached_targets: torch.Tensor  # [C, D + 1] float32: targets and inverse norms of latents, from the target cache
    latent_order: torch.Tensor  # [M] int64: place of each latent among those of helper images, then the cached ones
    num_grounded_samples: int  # rows with a latent loss: those with helper images or cached targets
    sample_tokens: list[int]  # [S] tokens of each sample
    keys: list[str]  # [S] each sample's key, for messages
    sample_sets: torch.Tensor  # [S] int64: the number of each sample's set, of the run's folders of shards
    faults: list[str] = field(default_factory=list)  # of samples that could not be used, and whose places others took
    sample_ends: torch.Tensor | None = None  # [S] int32: flat positions where packed samples end; None: not packed
    hidden_from: torch.Tensor | None = None  # [B] int64: nothing from this column on attends to the row's images
    hide_columns: list[int] = field(default_factory=list)  # those of `hidden_from` that are columns, ascending

    @property
    def image_mask(self) -> torch.Tensor:
        """[B, L] bool: True where the input is an embedding of an image."""
        flat = torch.zeros_like(self.attention_mask).flatten()
        return flat.index_fill_(0, self.image_rows, True).view_as(self.attention_mask)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(self.sample_tokens)

    @property
    def num_cells(self) -> int:
        """Columns of all rows, padding among them."""
        return self.input_ids.numel()

    def samples_at(self, rows: torch.Tensor) -> torch.Tensor:
        """[n] int64: the number of the sample, in this batch, at each of [n] flat positions."""
        if self.sample_ends is None:
            return rows // self.input_ids.shape[1]
        return torch.searchsorted(self.sample_ends, rows.to(self.sample_ends.dtype), right=True)

    def to(self, device: torch.device | str) -> "Batch":
        """Moves every tensor; copies from pinned memory are asynchronous."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader's pinning thread."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)
