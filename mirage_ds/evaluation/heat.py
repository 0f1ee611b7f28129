"""Where in the input images a latent points: the cosine between its state and each patch's embedding, as a heat map.

States and patch embeddings both are inputs of the decoder, of one size D, and stage 1 trains states towards means of
patch embeddings (of the helper image). A cosine says that two inputs are alike, not that the model looks there.

Shape legend: M latents, R rows and C columns of an image's merged patches, D hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample
from mirage_ds.inference.generate import Decoder
from mirage_ds.model.tower import Tower

# Told apart in any kind of colour vision, and both visible on a grey image, on a dark page and on a light one.
TOWARDS, AWAY = (255, 140, 0), (30, 120, 255)
DIMMED = 0.5  # how far the image is moved to a middle grey


@torch.inference_mode()
def heat_maps(
    decoder: Decoder, encoder: Encoder, sample: Sample, states: Sequence[torch.Tensor]
) -> list[NDArray[np.float32]]:
    """The cosines, from -1 to 1, between the states of a row's latents and the patches of its input images.

    Args:
        states: M of [D], such as those of a `Generation`.

    Returns:
        For each input image [M, R, C].

    Raises:
        DataError: an image cannot be decoded.
    """
    if not sample.input_images or not len(states):
        return [np.zeros((len(states), 0, 0), np.float32) for _ in sample.input_images]
    backbone = decoder.backbone
    batch = collate([encoder.prompt(sample)], align_latents=False).to(backbone.device)
    patches, _ = Tower(backbone.visual, trained=False, attention=backbone.attention).encode(batch)
    directions = normalize(torch.stack([state.to(patches.device, torch.float32) for state in states]), dim=1)
    cosines = directions @ normalize(patches.float(), dim=1).T
    images = cosines.split([rows * columns for rows, columns in batch.image_grids], dim=1)
    return [image.unflatten(1, grid).cpu().numpy() for image, grid in zip(images, batch.image_grids, strict=True)]


def overlay(image: Image.Image, cosines: NDArray[np.float32]) -> Image.Image:
    """A heat map [R, C] over its image, which is grey and dimmed; a patch is one rectangle of one colour.

    The scale is fixed: orange for 1, blue for -1, transparent for 0, so that pictures can be compared.
    """
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    below = (1 - DIMMED) * grey + DIMMED * 128
    heat = Image.fromarray(np.clip(cosines, -1, 1).astype(np.float32)).resize(image.size, Image.Resampling.NEAREST)
    strength = np.asarray(heat)[..., None]
    color = np.where(strength >= 0, np.array(TOWARDS, np.float32), np.array(AWAY, np.float32))
    mixed = below + np.abs(strength) * (color - below)
    return Image.fromarray(mixed.round().astype(np.uint8))
