"""From files of images to the tower's values and gradients, against transformers' image processor and tower."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.images import decode
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.model.tower import Tower
from mirage_ds.self_check import tiny_backbone

LIMITS = {"min_pixels": 3136, "max_pixels": 100_352}
SETTINGS: dict[str, dict[str, Any]] = {
    "published": LIMITS,
    "other numbers": LIMITS | {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 1.0, 3.0], "rescale_factor": 1 / 128},
}


def random_images(count: int) -> list[Image.Image]:
    """Of sizes from 8 to 600 pixels a side, some multiples of 28; PNG and JPEG; the first has all bytes."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(np.arange(112 * 56, dtype=np.uint8).reshape(56, 112)).convert("RGB")]
    for number in range(count):
        size = draw.integers(8, 600, 2) if number % 3 else 28 * draw.integers(1, 20, 2)
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, ("PNG", "JPEG")[number % 2])
        images.append(decode(file.getvalue(), "here"))
    return images


def tower_in(dtype: torch.dtype) -> Tower:
    return Tower(tiny_backbone().visual.to(dtype), trained=False, attention="sdpa")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_transformers(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, with and without resizing; an eighth of the bytes."""
    plain, images = Qwen2VLImageProcessorPil(**settings), random_images(24)
    expected = plain(images, return_tensors="pt")
    patches, grid_thw = ImageProcessor(plain)(images)
    assert torch.equal(grid_thw, expected["image_grid_thw"])
    assert 8 * patches.nbytes == expected["pixel_values"].nbytes
    found = tower_in(dtype).patch_values(patches, ImageProcessor(plain).pixel_levels)
    assert torch.equal(found, expected["pixel_values"].to(dtype))


def test_a_trained_tower_has_transformers_gradients() -> None:
    """Of all its weights, those of both frames in the patch embedding too."""
    plain, images = Qwen2VLImageProcessorPil(**LIMITS), random_images(3)
    expected, visual = plain(images, return_tensors="pt"), tiny_backbone().visual.requires_grad_(True)
    draw = torch.Generator().manual_seed(0)

    def gradients(outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.randn(outputs.shape, generator=draw.manual_seed(0))
        grads = torch.autograd.grad((outputs * weights).sum(), list(visual.parameters()))
        return dict(zip(dict(visual.named_parameters()), grads, strict=True))

    theirs = gradients(visual(expected["pixel_values"], grid_thw=expected["image_grid_thw"]).pooler_output)
    processor, tower = ImageProcessor(plain), Tower(visual, trained=True, attention="sdpa")
    patches, grid_thw = processor(images)
    values = tower.patch_values(patches, processor.pixel_levels)
    ours = gradients(tower(values, processor.merged_grids(grid_thw)))
    assert theirs["patch_embed.proj.weight"].shape[2] == 2
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
