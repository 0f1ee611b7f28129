"""MirageModel: the losses of a micro-batch, by stage of the method:

- stage 1: helper images -> latent targets, which are also the inputs; text loss + cosine loss
- stage 2: latents are fed back by the rollout; text loss
- text: no latents; text loss
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mirage_ds.batch import Batch
from mirage_ds.config import CompressStrategy, Stage
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.losses import LossHead, latent_losses
from mirage_ds.model.rollout import Rollout
from mirage_ds.model.targets import LatentTargets, add_cached, build_inputs_embeds, latent_targets
from mirage_ds.model.tower import Tower

# Prefixes of MirageModel's parameter names -> those of transformers.
HF_NAMES = {
    "tower.visual.": "model.visual.",
    "embed_tokens.": "model.language_model.embed_tokens.",
    "rollout.layers.": "model.language_model.layers.",
    "rollout.norm.": "model.language_model.norm.",
    "rollout.head.own_weight": "lm_head.weight",
    "rollout.head.own_rows": "lm_head.rows",
}


def hf_name(name: str) -> str:
    """A parameter's name in transformers' model."""
    prefix = next(prefix for prefix in HF_NAMES if name.startswith(prefix))
    return HF_NAMES[prefix] + name.removeprefix(prefix)


class Losses(NamedTuple):
    """Sums over the samples of a micro-batch of each sample's mean; they add up however a global batch is split."""

    loss: torch.Tensor  # [] float32, weighted sum of the two: the training objective
    ce_loss: torch.Tensor  # [] float32
    latent_loss: torch.Tensor  # [] float32; 0 outside stage 1


class MirageModel(torch.nn.Module):
    """Qwen2.5-VL with latents, as three units: tower, embeddings, rollout. Each is entered once per micro-step."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        stage: Stage,
        ce_loss_weight: float,
        latent_loss_weight: float = 1.0,
        recompute: bool = True,
        train_tower: bool = False,
        compress_strategy: CompressStrategy = "average",
    ) -> None:
        super().__init__()
        self.stage, self.compress_strategy = stage, compress_strategy
        self.ce_loss_weight, self.latent_loss_weight = ce_loss_weight, latent_loss_weight
        # Gets slots of helper images, their K, and their targets.
        self.keep_targets: Callable[[Sequence[int], Sequence[int], LatentTargets], None] | None = None
        # Gets hidden states, targets and the tokens' embeddings, without gradients, after each forward.
        self.keep_states: Callable[[torch.Tensor, LatentTargets, torch.Tensor, Batch], None] | None = None
        # Gets the weighted losses of supervised tokens and of latents, without gradients, after each forward.
        self.keep_losses: Callable[[torch.Tensor, torch.Tensor, Batch], None] | None = None
        self.tower = Tower(backbone.visual, trained=train_tower, attention=backbone.attention)
        self.embed_tokens = backbone.embed_tokens
        self.rollout = Rollout(
            backbone.layers,
            backbone.norm,
            backbone.rotary_emb,
            LossHead(backbone.head_weight, backbone.vocab_size, shared=backbone.tied, trained_rows=backbone.head_rows),
            recurrent=stage == "stage2",
            recompute=recompute,
            attention=backbone.attention,
        )

    def forward(self, batch: Batch, num_passes: int | None = None) -> Losses:
        """
        Args:
            batch: on the model's device.
            num_passes: see Rollout.forward.
        """
        image_embeds, helper_embeds = self.tower.encode(batch)
        text_embeds = self.embed_tokens(batch.input_ids)
        pooled = latent_targets(helper_embeds, batch, self.compress_strategy, text_embeds.dtype)
        if self.keep_targets is not None and batch.target_slots:
            self.keep_targets(batch.target_slots, batch.latent_sizes, pooled)
        latents = add_cached(pooled, batch)
        inputs_embeds = build_inputs_embeds(text_embeds, image_embeds, latents.inputs, batch)
        if torch.is_grad_enabled() and not inputs_embeds.requires_grad:  # embeddings are frozen: see Rollout.forward
            inputs_embeds.requires_grad_()
        hidden, target_losses = self.rollout(inputs_embeds, batch=batch, num_passes=num_passes)
        if self.keep_states is not None:
            self.keep_states(hidden.detach(), latents, text_embeds.detach(), batch)
        text_losses = target_losses * batch.target_weights
        latent_losses = self.latent_losses(hidden, latents, batch)
        if self.keep_losses is not None:
            self.keep_losses(text_losses.detach(), latent_losses.detach(), batch)
        ce_loss, latent_loss = text_losses.sum(), latent_losses.sum()
        loss = self.ce_loss_weight * ce_loss + self.latent_loss_weight * latent_loss
        return Losses(loss, ce_loss, latent_loss)

    def latent_losses(self, hidden: torch.Tensor, latents: LatentTargets, batch: Batch) -> torch.Tensor:
        """[M] float32, weighted: 1 - cosine between the hidden state one position before each latent and its target."""
        if self.stage != "stage1":
            return hidden.new_zeros(len(batch.latent_rows), dtype=torch.float32)
        latent_pred = hidden.flatten(0, 1)[batch.latent_rows - 1]
        # Otherwise a trained tower could lower the loss by moving the targets towards each other.
        targets, inverse_norms = latents.targets.detach(), latents.inverse_norms.detach()
        return latent_losses(latent_pred, targets, inverse_norms) * batch.latent_weights
