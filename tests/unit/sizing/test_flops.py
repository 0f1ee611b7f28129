"""FLOPs of a batch against torch's own counter, which adds up the matrix products that really run."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import golden_set
import numpy as np
import pytest
import torch
from random_samples import END, PAD, START, random_sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirage_ds.config import Config, ModelConfig
from mirage_ds.data.collate import collate
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.trained import choose_trained
from mirage_ds.model.windows import image_windows
from mirage_ds.sizing.flops import batch_load, window_pairs, work, work_of
from mirage_ds.sizing.gpus import GPUS, gpu_of_device
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.workload import Row


def config(stage: str, **model: object) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": golden_set.MODEL, **model},
            "data": {"shards": "unused"},
            "train": {"stage": stage, "max_steps": 1, "warmup_steps": 0, "micro_batch_size_per_gpu": 2},
        }
    )


LORA = {"lora": {"rank": 4, "target_modules": "attention"}}
SETTINGS = [{}, {"activation_checkpointing": "full"}, {"train_tower": True}, {"train_merger": True}, LORA]
SETTINGS += [{"train_tower": True, "freeze": ["model.visual.blocks.0.*", "lm_head.*", "*.mlp.up_proj.*"]}]


@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_a_batch_takes_what_torch_counts(more: dict[str, Any]) -> None:
    """Two rows of different lengths, three images and two helper images, forward and backward.

    torch counts attention over all pairs of columns, padding too. The mathematics needs the causal half of those of a
    row, which is the only difference, and so is set to torch's here. Rotating positions takes a few more products.
    """
    settings = config("stage1", **({"activation_checkpointing": "none"} | more))
    batch = collate([random_sample(seed, stage="stage1", images=seed) for seed in (1, 2)], align_latents=False)
    assert batch.sample_tokens[0] != batch.sample_tokens[1]
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    choose_trained(backbone, settings.model, [PAD, START, END], seed=0)
    model = MirageModel(
        backbone,
        stage="stage1",
        ce_loss_weight=0.1,
        recompute=settings.model.activation_checkpointing == "full",
        train_tower=settings.model.trains_vision,
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).loss.backward()

    sizes = model_sizes(settings.model)
    rows, columns = batch.input_ids.shape
    as_torch = replace(batch_load(sizes, batch), tokens=rows * columns, token_pairs=rows * columns**2)
    assert work_of(sizes, settings, as_torch).computed == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_attention_is_causal_and_padding_is_not_counted() -> None:
    """By hand: rows of 3 and 5 tokens have 6 and 15 pairs."""
    sizes = model_sizes(ModelConfig(path=golden_set.MODEL))
    batch = SimpleNamespace(sample_tokens=[3, 5], num_tokens=8, target_rows=[0] * 4, pixel_values=[0] * 24)
    batch.image_grids = [(1, 2), (2, 2)]
    load = batch_load(sizes, batch)
    assert (load.tokens, load.token_pairs, load.targets) == (8, 21, 4)
    assert (load.patches, load.image_pairs, load.window_pairs) == (24, 8**2 + 16**2, 8**2 + 16**2)


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (9, 6), (3, 13)])
def test_pairs_within_windows(grid: tuple[int, int]) -> None:
    """The product of sums is what the tower's own windows add up to."""
    assert window_pairs(grid, 4) == sum((4 * len(window)) ** 2 for window in image_windows(grid, 4))
    assert sum(len(np.unique(window)) for window in image_windows(grid, 4)) == grid[0] * grid[1]


def test_the_planner_counts_as_the_trainer() -> None:
    """Rows of one square image of complete windows: there the planner's bounds are exact."""
    settings = config("stage1")
    sizes = model_sizes(settings.model)
    row = Row(tokens=90, targets=30, patches=256)
    batch = SimpleNamespace(sample_tokens=[90, 90], num_tokens=180, target_rows=[0] * 60, image_grids=[(8, 8), (8, 8)])
    batch.pixel_values = torch.zeros(512, 1)
    assert work(sizes, settings, row) == work_of(sizes, settings, batch_load(sizes, batch))


def test_a_gpu_is_known_by_the_name_that_the_driver_gives_it() -> None:
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is GPUS["h100-80gb"]
    assert gpu_of_device("NVIDIA H200") is GPUS["h200-141gb"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 3090"):
        assert gpu_of_device(other) is None  # another rate, or an unknown one
