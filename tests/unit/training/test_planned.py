"""What a run's figures are compared with: on a GPU, what `mirage-launch plan` prints for it; on a CPU nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.planner.estimate import estimate
from mirage_ds.config import Config
from mirage_ds.recipe import load_config
from mirage_ds.training import device
from mirage_ds.training.planned import plan
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "qwen2.5-vl-7b-stage2.yaml"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    return load_config(RECIPE, ["data.shards=gone", "train.micro_batch_size_per_gpu=1"])


@pytest.fixture
def name_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(device, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    return monkeypatch


def test_a_gpu_is_compared_with_its_plan(config: Config, name_gpu: pytest.MonkeyPatch) -> None:
    name_gpu.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    planned = plan(config, resolve_deepspeed_config(config))
    assert planned.peak_bytes == estimate(config, 1, 8, "h100-80gb").memory.peak
    assert planned.peak_flops == 989e12  # in bf16


def test_an_unknown_gpu_has_a_plan_and_no_peak_rate(config: Config, name_gpu: pytest.MonkeyPatch) -> None:
    name_gpu.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    planned = plan(config, resolve_deepspeed_config(config))
    assert planned.peak_bytes is not None
    assert planned.peak_flops is None


def test_a_cpu_has_neither(config: Config) -> None:
    planned = plan(config, resolve_deepspeed_config(config))
    assert (planned.peak_bytes, planned.peak_flops) == (None, None)
