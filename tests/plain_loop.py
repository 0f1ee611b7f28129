"""An independent trainer: plain PyTorch and transformers, one process, one sample at a time, no cache, no padding.

It does not use mirage_ds. Stage 2 runs the complete model over the growing prefix for each latent, so that it shares
neither the KV cache nor the splitting of columns with the tested code.
"""

from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

Sample = dict[str, Any]
"""input_ids, labels [L]; latent_mask, image_mask [L] bool; pixel_values [P, 588] bytes (pixel, color), and
pixel_levels [3, 256], the value of each byte; image_grid_thw [n, 3]; pixel_values_latent, image_grid_thw_latent: of the
helper images, or empty; latent_sizes: K of each latent block; hides_images: whether nothing after the first latent
block attends to the images."""


def positions(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """transformers' own positions [3, 1, L]."""
    types = sample["image_mask"].int()[None]
    grids = sample["image_grid_thw"] if len(sample["image_grid_thw"]) else None
    return model.model.get_rope_index(sample["input_ids"][None], types, grids)[0]


def normalized(sample: Sample, kind: str = "") -> torch.Tensor:
    """A sample's patches as transformers has them [P, 1176]: for each color the pixels of two equal frames."""
    colors = [
        levels[sample[f"pixel_values{kind}"][:, color::3].long()]
        for color, levels in enumerate(sample["pixel_levels"].to(sample["pixel_values"].device))
    ]
    return torch.cat([frame for color in colors for frame in (color, color)], dim=1)


def images(model: torch.nn.Module, sample: Sample, kind: str = "") -> torch.Tensor:
    """[merged patches, D] of the input images or, with `_latent`, of the helper images; empty without an image."""
    grids = sample[f"image_grid_thw{kind}"]
    if not len(grids):
        return torch.zeros(0, model.config.text_config.hidden_size)
    patches = normalized(sample, kind).to(next(model.parameters()).dtype)
    return model.model.visual(patches, grid_thw=grids).pooler_output


def targets(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Of each helper image, the means of K equal runs of patches, the remainder dropped: [latents of all blocks, D]."""
    grids = sample["image_grid_thw_latent"]
    helpers = images(model, sample, "_latent").split((grids.prod(dim=1) // 4).tolist())
    means = []
    for patches, size in zip(helpers, sample["latent_sizes"], strict=True):
        group = len(patches) // size
        means += [patches[k * group : (k + 1) * group].mean(0) for k in range(size)]
    return torch.stack(means)


def attention_mask(sample: Sample) -> torch.Tensor | None:
    """[1, 1, L, L] bool, causal, in which later tokens than the first block's latents see no image; None: causal."""
    if not (sample.get("hides_images") and sample["latent_sizes"]):
        return None
    length = len(sample["input_ids"])
    mask = torch.ones(length, length).tril().bool()
    first_block = sample["latent_mask"].nonzero().flatten()[: sample["latent_sizes"][0]]
    for image_column in sample["image_mask"].nonzero().flatten():
        mask[first_block[-1] + 1 :, image_column] = False
    return mask[None, None]


def hidden_states(
    model: torch.nn.Module, embeds: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Final-normed states [L, D] of one sequence [L, D], without a cache."""
    length = len(embeds)
    output = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=position_ids[:, :, :length],
        attention_mask=None if mask is None else mask[..., :length, :length],
        use_cache=False,
    )
    return output.last_hidden_state[0]


def sample_losses(model: torch.nn.Module, sample: Sample, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and latent loss of one sample, each its own mean; 0 where there is nothing to average."""
    position_ids, mask = positions(model, sample), attention_mask(sample)
    text = model.get_input_embeddings()(sample["input_ids"])
    image_rows = iter(images(model, sample))
    latents = sample["latent_mask"].nonzero().flatten().tolist()
    rows = [next(image_rows) if is_image else row for row, is_image in zip(text, sample["image_mask"], strict=True)]
    pooled = targets(model, sample) if stage == "stage1" and latents else torch.zeros(0, text.shape[1])
    for number, place in enumerate(latents if stage != "text" else []):
        if stage == "stage1":
            rows[place] = pooled[number]
        else:
            rows[place] = hidden_states(model, torch.stack(rows[:place]), position_ids, mask)[-1]
    hidden = hidden_states(model, torch.stack(rows), position_ids, mask)
    cosines = [
        torch.cosine_similarity(hidden[p - 1], pooled[n].detach(), dim=0) for n, p in enumerate(latents[: len(pooled)])
    ]
    latent_loss = 1 - torch.stack(cosines).mean() if cosines else torch.zeros(())
    supervised = (sample["labels"][1:] != -100).nonzero().flatten()
    if not len(supervised):
        return hidden.sum() * 0, latent_loss
    logits = model.lm_head(hidden[supervised])
    return torch.nn.functional.cross_entropy(logits, sample["labels"][1:][supervised]), latent_loss


def summed(folder: str, samples: list[Sample], stage: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the samples' losses, and its gradients, by transformers' names. The tower is not trained."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    total = 0.0
    for sample in samples:
        ce_loss, latent_loss = sample_losses(model, sample, stage)
        loss = (0.1 if stage == "stage1" else 1.0) * ce_loss + latent_loss
        loss.backward()
        total += loss.item()
    return total, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def train(
    folder: str,
    global_batches: list[list[Sample]],
    stage: str,
    *,
    lrs: list[float],
    ce_loss_weight: float,
    weight_decay: float = 0.01,
    gradient_clipping: float = 1.0,
    train_tower: bool = False,
) -> dict[str, list[float]]:
    """One optimizer step per global batch; the losses and gradient norms of all steps."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(train_tower)
    return train_model(
        model,
        global_batches,
        stage,
        lrs=lrs,
        ce_loss_weight=ce_loss_weight,
        weight_decay=weight_decay,
        gradient_clipping=gradient_clipping,
    )


def train_model(
    model: Any,
    global_batches: list[list[Sample]],
    stage: str,
    *,
    lrs: list[float],
    ce_loss_weight: float,
    weight_decay: float = 0.01,
    gradient_clipping: float = 1.0,
    eps: float = 1e-8,
) -> dict[str, list[float]]:
    """As `train`, of the parameters of a model that require grad.

    Two parameter groups: matrices decay, vectors do not.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=eps,
    )
    losses, norms = [], []
    for samples, lr in zip(global_batches, lrs, strict=True):
        optimizer.zero_grad()
        total = 0.0
        for sample in samples:
            ce_loss, latent_loss = sample_losses(model, sample, stage)
            loss = (ce_loss_weight * ce_loss + latent_loss) / len(samples)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, gradient_clipping or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        losses.append(total)
        norms.append(norm.item())
    return {"losses": losses, "grad_norms": norms}
