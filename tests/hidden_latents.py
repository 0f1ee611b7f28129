"""A decoder whose latents no later column attends to: what is fed there can then change no answer."""

from dataclasses import replace
from typing import Any

import torch

from mirage_ds.inference.generate import Decoder
from mirage_ds.model.backbone import Backbone


class HidesLatents(Backbone):
    """Each step attends to the columns before it, but not to those of latents: inputs that are no token's embedding."""

    latents: torch.Tensor  # [B, columns so far] bool

    def step(self, embeds: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        if embeds.shape[1] > 1:  # the prompts
            self.latents = torch.zeros_like(mask)
            return super().step(embeds, position_ids, mask, cache)
        seen = mask.clone()
        seen[:, :-1] &= ~self.latents
        # The embedding of <|endoftext|>, which ends an answer, is zero.
        is_token = (embeds == self.embed_tokens.weight).all(dim=-1).any(dim=1) & embeds.any(dim=-1)[:, 0]
        self.latents = torch.cat([self.latents, ~is_token[:, None]], dim=1)
        return super().step(embeds, position_ids, seen, cache)


def hide_latents(decoder: Decoder) -> Decoder:
    """The same decoder with such steps."""
    backbone = decoder.backbone
    return replace(decoder, backbone=HidesLatents(backbone.hf, backbone.attention, backbone.no_flash))
