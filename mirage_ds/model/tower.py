"""The vision tower: patches of images -> patch embeddings.

Patches come as bytes; they are rescaled, normalized and laid out here, on the device. Then it runs transformers' own
modules, in an order of its own: patches are embedded by a matrix product (a convolution whose stride is its kernel),
and attention takes one call for all windows of one size instead of one call each.
"""

from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mirage_ds.batch import Batch
from mirage_ds.model.windows import Sequences, lay_out
from mirage_ds.patch_grid import CELL_PATCHES, Grid

ROPE_THETA = 10_000.0  # of every Qwen2.5-VL; older transformers have it in their code, not in the configuration


class Tower(torch.nn.Module):
    """The vision tower with its merger; one ZeRO-3 leaf module, entered once per micro-step.

    What is frozen stores no activations. The input of a tower of which something is trained must require grad: ZeRO-3
    reduces the gradients of a leaf module, and releases it, when the gradient of its input is computed.
    """

    def __init__(self, visual: Any, *, trained: bool, attention: str) -> None:
        super().__init__()
        self.visual = visual
        self.trained = trained
        before_merger = (weight for name, weight in visual.named_parameters() if not name.startswith("merger."))
        self.merger_only = trained and not any(weight.requires_grad for weight in before_merger)
        self.attention = attention
        self.dtype = next(visual.parameters()).dtype
        config = visual.config
        self.window_cells = config.window_size // (config.patch_size * config.spatial_merge_size)
        self.patch_pixels = config.patch_size**2
        self.num_frames = config.temporal_patch_size
        self.full_blocks = frozenset(config.fullatt_block_indexes)
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads

    def forward(self, pixel_values: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """Values [P, 1176] of images with these grids -> [P / 4, D], images in order, cells in raster order."""
        learns = self.trained and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and not self.merger_only):
            layout = lay_out(grids, self.window_cells, pixel_values.device)
            hidden = linear(pixel_values, self.visual.patch_embed.proj.weight.flatten(1))
            hidden = reorder(hidden, layout.cells)
            rotary = self.rotary(layout.positions)
            for number, block in enumerate(self.visual.blocks):
                sequences = layout.images if number in self.full_blocks else layout.windows
                hidden = self.attend(block.attn, block.norm1(hidden), rotary, sequences).add_(hidden)
                hidden = block.mlp(block.norm2(hidden)).add_(hidden)
        with torch.set_grad_enabled(learns):
            if learns and self.merger_only:
                hidden = hidden + 0 * pixel_values[:1, :1]  # so that the gradient of the input comes after the merger's
            return self.visual.merger(hidden)[layout.inverse]

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Input images' embeddings [image_rows, D] and helper images' embeddings [their patches, D].

        Both kinds are encoded together, so that every rank enters the tower once. Remaining embeddings are those of the
        dummy image of a micro-batch without images.
        """
        pixel_values = self.patch_values(batch.pixel_values, batch.pixel_levels)
        patch_embeds = self(pixel_values.requires_grad_(self.trained), batch.image_grids)
        num_input = len(batch.image_rows)
        num_helper = sum(rows * columns for rows, columns in batch.helper_grids)
        return patch_embeds[:num_input], patch_embeds[num_input : num_input + num_helper]

    def patch_values(self, pixel_values: torch.Tensor, pixel_levels: torch.Tensor) -> torch.Tensor:
        """Bytes of patches [P, 588] and what stands for each byte [3, 256] -> [P, 1176] in the tower's dtype.

        The values are looked up, so they are those of transformers' image processor in every bit. An image is a video
        of equal frames. From pixels of red, green and blue to all red ones of all frames, all green ones, all blue.
        """
        colors = 256 * torch.arange(3, dtype=torch.int32, device=pixel_values.device)
        places = pixel_values.view(-1, 3) + colors
        values = pixel_levels.to(self.dtype).flatten().index_select(0, places.flatten())
        frames = values.view(len(pixel_values), -1, self.patch_pixels, 3).expand(-1, self.num_frames, -1, -1)
        return frames.permute(0, 3, 1, 2).flatten(1)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of patches at positions [P, 2]: [P, 1, 1, head_dim / 2] float32, rows' then columns'."""
        exponents = torch.arange(0, 1, 4 / self.head_dim, device=positions.device)
        angles = (positions[..., None] * (1 / ROPE_THETA**exponents)).flatten(1)[:, None, None]
        return angles.cos(), angles.sin()

    def attend(
        self,
        attn: Any,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        sequences: Sequences,
    ) -> torch.Tensor:
        """Attention of [P, hidden size] within each sequence."""
        qkv = attn.qkv(hidden).view(len(hidden), 3, self.num_heads, self.head_dim)
        rotate_(qkv[:, :2], *rotary)
        if sequences.cells is not None:
            qkv = reorder(qkv, sequences.cells)
        attended = self.flash(attn, qkv, sequences) if self.attention == "flash_attention_2" else sdpa(qkv, sequences)
        if sequences.inverse is not None:
            attended = reorder(attended, sequences.inverse)
        return attn.proj(attended.flatten(1))

    def flash(self, attn: Any, qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """[P, 3, H, head_dim] -> [P, H, head_dim], in one call for sequences of any lengths."""
        query, key, value = qkv.permute(1, 2, 0, 3)[:, None]
        longest = sequences.groups[-1][1]
        attended, _ = ALL_ATTENTION_FUNCTIONS["flash_attention_2"](
            attn,
            query,
            key,
            value,
            attention_mask=None,
            scaling=attn.scaling,
            cu_seq_lens_q=sequences.ends,
            cu_seq_lens_k=sequences.ends,
            max_length_q=longest,
            max_length_k=longest,
            is_causal=False,
        )
        return attended[0]


def sdpa(qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """[P, 3, H, head_dim] -> [P, H, head_dim], in one call for all sequences of one length."""
    parts = qkv.split([number * length for number, length in sequences.groups])
    attended = []
    for part, (number, length) in zip(parts, sequences.groups, strict=True):
        query, key, value = part.unflatten(0, (number, length)).permute(2, 0, 3, 1, 4)
        attended.append(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)


def rotate_(query_key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary positions, computed in float32, in place: [P, 2, H, head_dim]."""
    half = query_key.shape[-1] // 2
    first, second = query_key[..., :half].float(), query_key[..., half:].float()
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    query_key[..., :half].copy_(rotated[0])
    query_key[..., half:].copy_(rotated[1])


def reorder(patches: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """[P, ...] in another order of their cells [C]."""
    return patches.unflatten(0, (-1, CELL_PATCHES))[cells].flatten(0, 1)
