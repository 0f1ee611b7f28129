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

# From low to high; lightness grows all the way, so that it can be read without seeing colours, and in print.
COLORS = ((20, 11, 53), (101, 21, 110), (187, 55, 84), (243, 119, 25), (252, 255, 164))
WEIGHT = 0.65  # of the colour; the rest is the image


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


def overlay(image: Image.Image, cosines: NDArray[np.float32], low: float, high: float) -> Image.Image:
    """A heat map [R, C] over its image, which is grey; a patch is one rectangle of one colour, as the model has it.

    Args:
        low, high: the cosines of the first and the last colour. They belong beside the picture: a narrow range has the
            same colours as a wide one.
    """
    places = np.clip((cosines - low) / max(high - low, 1e-9), 0, 1) * (len(COLORS) - 1)
    channels = [np.interp(places, range(len(COLORS)), channel) for channel in zip(*COLORS, strict=True)]
    colors = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    colors = colors.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), colors, WEIGHT)
