"""The training step of Mirage's published code, restated from what it computes, on transformers' own modules.

It is what `train_step.py` compares with: one row per micro-batch; logits of all positions in float32; dense masks in
the vision tower, made in every block; latents fed back through lists of positions; one growing KV cache; nothing
recomputed. Its first stage does recompute when it is run as published, which costs it about a tenth more: left out
here, as is everything that happens before the step (collation, two calls of the processor).

What differs from the published code, besides the version of transformers: the tower's positions and windows come from
transformers' own functions, and its decoder attends with grouped keys where no mask is needed. Both make it faster.
"""

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mirage_ds.config import Stage
from mirage_ds.data.encode import EncodedSample


def on_device(row: EncodedSample, device: torch.device) -> EncodedSample:
    """The row with all its tensors on the device."""
    tensors = {each.name: getattr(row, each.name) for each in fields(row)}
    return replace(row, **{name: v.to(device) for name, v in tensors.items() if isinstance(v, torch.Tensor)})


def reference_loss(hf: Any, row: EncodedSample, stage: Stage, text_weight: float) -> torch.Tensor:
    """The loss of one row, a scalar. In stage 2 its latents must be one block.

    Args:
        text_weight: weight of the text loss; that of the latent loss is 1.
    """
    embeds = input_embeds(hf, row)
    if stage == "stage2":
        hidden = fed_back(hf, row, embeds)
        return text_weight * text_loss(hf, row, hidden)
    latents = row.latent_mask[None]
    if stage == "stage1":
        embeds[latents] = pooled_helper(hf, row)
    hidden = decode(hf, row, embeds, 0, len(row.input_ids), None)
    loss = text_weight * text_loss(hf, row, hidden)
    if stage == "stage1":
        predictions = hidden[:, :-1][latents[:, 1:]]
        loss = loss + (1 - cosine_similarity(predictions, embeds[latents], dim=-1).mean())
    return loss


def input_embeds(hf: Any, row: EncodedSample) -> torch.Tensor:
    """[1, L, D]: embeddings of the tokens, and of the image in its places."""
    embeds = hf.model.language_model.embed_tokens(row.input_ids[None])
    values = patch_values(row.pixel_values, row.pixel_levels)
    image = encode_images(hf.model.visual, values, row.image_grid_thw)
    return embeds.masked_scatter(row.image_mask[None, :, None].expand_as(embeds), image.to(embeds.dtype))


def pooled_helper(hf: Any, row: EncodedSample) -> torch.Tensor:
    """[K, D]: the means of K runs of the helper image's embeddings, the remainder dropped."""
    values = patch_values(row.pixel_values_latent, row.pixel_levels)
    patches = encode_images(hf.model.visual, values, row.image_grid_thw_latent)
    (size,) = row.latent_sizes
    return patches[: len(patches) // size * size].unflatten(0, (size, -1)).mean(dim=1)


def patch_values(pixel_values: torch.Tensor, pixel_levels: torch.Tensor) -> torch.Tensor:
    """Bytes [P, pixels and colors] and their values [3, 256] -> patches [P, 1176] of two equal frames."""
    colors = pixel_values.view(len(pixel_values), -1, 3).transpose(1, 2).long()
    values = pixel_levels.expand(len(colors), -1, -1).gather(2, colors)
    return torch.stack([values, values], dim=2).flatten(1)


def encode_images(visual: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Patches [P, 1176] -> [P / 4, D], in raster order; every block attends through a dense mask."""
    merge, window_cells = visual.spatial_merge_size, visual.spatial_merge_unit
    order, window_ends = get_vision_window_index(
        grid_thw, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
    )
    image_ends = get_vision_cu_seqlens(grid_thw)

    def as_windows(patches: torch.Tensor) -> torch.Tensor:
        return patches.unflatten(0, (-1, window_cells))[order].flatten(0, 1)

    hidden = as_windows(visual.patch_embed(pixel_values))
    cos, sin = visual.rotary_pos_emb(hidden, get_vision_position_ids(grid_thw, merge))
    rotary = as_windows(cos), as_windows(sin)
    for number, block in enumerate(visual.blocks):
        ends = image_ends if number in visual.fullatt_block_indexes else window_ends
        hidden = hidden + attend(block.attn, block.norm1(hidden), ends, rotary)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)[torch.argsort(order)]


def attend(
    attn: Any, hidden: torch.Tensor, ends: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Attention of all patches [P, hidden size] to all, behind a mask [1, P, P] of those in the same sequence."""
    patches = len(hidden)
    query, key, value = attn.qkv(hidden).view(patches, 3, attn.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    mask = torch.zeros(1, patches, patches, dtype=torch.bool, device=hidden.device)
    for start, end in pairwise(ends.tolist()):
        mask[:, start:end, start:end] = True
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))  # [heads, P, head dimension]
    attended = scaled_dot_product_attention(query, key, value, mask)
    return attn.proj(attended.transpose(0, 1).reshape(patches, -1))


def decode(
    hf: Any, row: EncodedSample, embeds: torch.Tensor, start: int, end: int, cache: DynamicCache | None
) -> torch.Tensor:
    """One forward of the columns [start, end): final-normed states [1, end - start, D]."""
    output = hf.model.language_model(
        inputs_embeds=embeds[:, start:end],
        position_ids=row.position_ids[:, None, start:end],
        attention_mask=torch.ones(1, end, dtype=torch.long, device=embeds.device),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def fed_back(hf: Any, row: EncodedSample, embeds: torch.Tensor) -> torch.Tensor:
    """Final-normed states [1, L, D]: a forward up to the latents, one for each latent but the last, one for the rest.

    A latent's input is the state one position before it. It is put in its place by taking the sequence apart into its
    positions and stacking them again, for each latent.
    """
    places = row.latent_mask.nonzero().flatten().tolist()
    cache = DynamicCache()
    states: list[torch.Tensor] = []
    for start, end in pairwise([0, *places, len(row.input_ids)]):
        if states:
            positions = [embeds[0, place] for place in range(embeds.shape[1])]
            positions[start] = states[-1][0, -1]
            embeds = torch.stack([torch.stack(positions)])
        states.append(decode(hf, row, embeds, start, end, cache))
    return torch.cat(states, dim=1)


def text_loss(hf: Any, row: EncodedSample, hidden: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens, from the logits of all positions in float32."""
    logits = hf.lm_head(hidden).float()
    return cross_entropy(logits[:, :-1].contiguous().flatten(0, 1), row.labels[1:])
