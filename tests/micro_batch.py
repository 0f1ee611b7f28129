"""One micro-batch through a model: what several tests compare."""

import torch

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.mirage import MirageModel


def losses_of(model: MirageModel, samples: list[EncodedSample], num_passes: int | None = None) -> tuple[float, float]:
    """Loss and gradient norm of one micro-batch."""
    model.zero_grad()
    losses = model(collate(samples, align_latents=model.stage == "stage2"), num_passes)
    losses.loss.backward()
    grads = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return losses.loss.item(), torch.stack(grads).norm().item()
