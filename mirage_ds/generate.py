"""Decoding with latents: batched, over a KV cache, each row in its own mode.

A row that emits <|latent_start|> enters latent mode: its next inputs are its own final-normed hidden states, each
written as a <|latent_pad|>, until the block ends with <|latent_end|>; then text again, and perhaps another block.

    latent_end: fixed   after K states
    latent_end: model   when the model would choose <|latent_end|>, at the latest after K states

The reference decodes with `model` and 8 (transformers' generation/utils.py:3286-3424 in UMass-Embodied-AGI/Mirage at
53f26de), but moves all rows of a batch in and out of latent mode together, and may never end a second block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import DynamicCache

from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.targets import Tower, build_inputs_embeds
from mirage_ds.tokens import TokenIds

LatentEnd = Literal["fixed", "model"]


@dataclass
class Generation:
    """What one row emitted."""

    ids: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)  # each [D]: the states that were fed back, in order


@dataclass
class Decoder:
    """Greedy decoding with one model."""

    backbone: Backbone
    ids: TokenIds
    latent_size: int
    latent_end: LatentEnd = "fixed"
    max_new_tokens: int = 1024
    feed: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden
    """What becomes of the states [B, D] before they are fed back; for ablations."""

    def __post_init__(self) -> None:
        self.backbone.hf.eval()

    def answers(self, prompts: Sequence[EncodedSample], batch_size: int) -> Iterator[Generation]:
        """Decodes prompts, `batch_size` at a time, in their order."""
        for start in range(0, len(prompts), batch_size):
            batch = collate(prompts[start : start + batch_size], align_latents=True)
            yield from self.generate(batch.to(self.backbone.embed_tokens.weight.device))

    @torch.inference_mode()
    def generate(self, batch: Batch) -> list[Generation]:
        """Decodes every row until <|im_end|> or <|endoftext|>, or `max_new_tokens`.

        Args:
            batch: prompts, padded on the left: collate(..., align_latents=True) of encoded prompts.
        """
        rows = [Generation() for _ in batch.keys]
        latent_steps = torch.full((len(rows),), -1)  # states fed in the current block; -1 outside of one
        done = torch.zeros(len(rows), dtype=torch.bool)
        cache = DynamicCache()
        mask = batch.attention_mask
        position = batch.position_ids.amax(dim=(0, 2)) + 1  # [B]: images count as grids, so not the length
        hidden = self.step(self.prompt_embeds(batch), batch.position_ids, mask, cache)
        for _ in range(self.max_new_tokens):
            chosen = self.backbone.hf.lm_head(hidden).argmax(dim=-1).cpu()
            emitted, latent_steps = self.next_tokens(chosen, latent_steps)
            feeds_state = latent_steps > 0
            fed = self.feed(hidden)
            for row, token in enumerate(emitted.tolist()):
                if not done[row]:
                    rows[row].ids.append(token)
                    rows[row].latents += [fed[row]] if feeds_state[row] else []
            done |= (emitted == self.ids.im_end) | (emitted == self.ids.end_of_text)
            if done.all():
                break
            embeds = self.backbone.embed_tokens(emitted.to(hidden.device))
            embeds = torch.where(feeds_state.to(hidden.device)[:, None], fed, embeds)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = self.step(embeds[:, None], position.expand(3, -1)[..., None], mask, cache)
            position = position + 1
        return rows

    def next_tokens(self, chosen: torch.Tensor, latent_steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows emit when the model chooses `chosen`, and how far their blocks are then: both [B] int64."""
        inside = latent_steps >= 0
        over = latent_steps >= self.latent_size
        if self.latent_end == "model":
            over |= chosen == self.ids.latent_end
        ends, goes_on = inside & over, inside & ~over
        emitted = torch.where(ends, self.ids.latent_end, torch.where(goes_on, self.ids.latent_pad, chosen))
        starts = ~inside & (chosen == self.ids.latent_start)
        steps = torch.where(goes_on, latent_steps + 1, torch.where(ends, -1, latent_steps))
        return emitted, torch.where(starts, 0, steps)

    def prompt_embeds(self, batch: Batch) -> torch.Tensor:
        """[B, L, D] of prompts with their images."""
        image_embeds, nothing = Tower(self.backbone.visual, trained=False).encode(batch)
        return build_inputs_embeds(self.backbone.embed_tokens(batch.input_ids), image_embeds, nothing, batch)

    def step(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Inputs [B, Q, D] -> final-normed state of each row's last column [B, D]."""
        output = self.backbone.hf.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]
