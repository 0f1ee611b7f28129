"""The reference's numbers, read from tests/parity/golden or from the folder that MIRAGE_GOLDEN_DIR names.

Shapes, ids and sizes are read from the set, so that another set of the same format can be used.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mirage_ds.data.encode import EncodedSample

FOLDER = Path(os.environ.get("MIRAGE_GOLDEN_DIR", Path(__file__).parent / "golden"))
MODEL = str(FOLDER / "model")
FRAMES, PATCH_PIXELS = 2, 14 * 14


@cache
def numbers(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def samples() -> list[dict[str, Any]]:
    return numbers("golden")["samples"]


def encoded(index: int, stage: str) -> EncodedSample:
    """Sample `index` of the set as our encoder would return it."""
    inputs, facts = tensors("inputs"), samples()[index]
    own = {name.split(".", 1)[1]: value for name, value in inputs.items() if name.startswith(f"{index}.")}
    input_ids = own["input_ids"][0].long()
    helper = stage == "stage1"
    # The set's values are 32nds of integers, and its two frames differ, which those of images do not: the bytes have
    # both, in the order of `ImageProcessor` in each.
    pixels, latent_pixels = (
        (own[name].int() + 128).byte().view(-1, 3, FRAMES, PATCH_PIXELS).permute(0, 2, 3, 1).flatten(1)
        for name in ("pixel_values_i8", "pixel_values_latent_i8")
    )
    return EncodedSample(
        key=f"golden {index}",
        input_ids=input_ids,
        labels=own["labels"][0].long(),
        position_ids=tensors("golden")[f"{index}.position_ids"].long(),
        image_mask=input_ids == numbers("golden")["ids"]["image_pad"],
        latent_mask=own["image_out_mask"][0].bool(),
        prompt_length=facts["prompt_len"],
        pixel_values=pixels,
        image_grid_thw=own["image_grid_thw"].long(),
        pixel_values_latent=latent_pixels[: None if helper else 0],
        image_grid_thw_latent=own["image_grid_thw_latent"].long()[: None if helper else 0],
        pixel_levels=((torch.arange(256) - 128) / 32).expand(3, -1),
        latent_sizes=[facts["latent_size"]],
    )
