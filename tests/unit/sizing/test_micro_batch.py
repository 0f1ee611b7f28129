"""Which micro-batch `auto` takes: by the limit, by the global batch, and what it may use on each kind of machine."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirage_ds.config import Config, TrainConfig
from mirage_ds.recipe import load_config
from mirage_ds.sizing import micro_batch
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.workload import Row, Shape, Workload
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "qwen2.5-vl-3b-stage2.yaml"
RANKS = 8


def recipe(size: int | str, *overrides: str) -> Config:
    fixed = [f"train.micro_batch_size_per_gpu={size}", "train.global_batch_size=64", "data.shards=gone"]
    return load_config(RECIPE, [*fixed, *overrides])


def peak(size: int) -> int:
    config = recipe(size)
    row = workload(config).largest_of(size)
    return estimate_memory(model_sizes(config.model), config, resolve_deepspeed_config(config), row, RANKS).peak


def choose(limit_bytes: int, config: Config | None = None) -> micro_batch.Choice:
    config = config or recipe("auto")
    settings, rows = resolve_deepspeed_config(config), workload(config)
    return micro_batch.choose(model_sizes(config.model), config, settings, rows, RANKS, limit_bytes)


@pytest.mark.parametrize(
    ("fits", "reason"), [(1, "2 would need "), (2, "4 would need "), (4, "8 would need "), (8, "a rank has 8 in each ")]
)
def test_the_limit_decides(fits: int, reason: str) -> None:
    """Of a rank's 8 samples: exactly what the limit holds, one byte less is not enough."""
    choice = choose(peak(fits))
    assert choice.size == fits
    assert str(choice).startswith(f"micro-batch {fits} (auto: {reason}")
    assert choose(peak(fits) - 1).size == max(1, fits // 2)


def test_rows_of_stage_2_are_padded_to_each_other() -> None:
    """What fits one row at a time does not fit two: the longest stretches before and after the latents may meet."""
    shapes = [Shape((leads, rest), (4,), targets=100, patches=400) for leads, rest in ((300, 100), (100, 300))]
    rows, sizes, config = Workload(shapes, 2, ""), model_sizes(recipe(1).model), recipe("auto")
    settings = resolve_deepspeed_config(config)

    def needed(row: Row) -> int:
        return estimate_memory(sizes, recipe(2), settings, row, RANKS).peak

    assert (
        needed(rows.aligned) == needed(Shape((300, 300), (4,), targets=100, patches=400).row()) > needed(rows.largest)
    )
    for limit_bytes, size in ((needed(rows.aligned), 2), (needed(rows.aligned) - 1, 1)):
        assert micro_batch.choose(sizes, config, settings, rows, RANKS, limit_bytes).size == size


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    choice = choose(peak(1) - 1)
    assert choice.size == 1
    assert choice.reason.startswith("by the estimate even 1 needs ")


@pytest.mark.parametrize(
    ("size", "ranks", "expected"), [(8, 8, [1]), (128, 8, [1, 2, 4, 8, 16]), (96, 8, [1, 2, 4]), (24, 8, [1])]
)
def test_the_candidates_divide_a_ranks_share(size: int, ranks: int, expected: list[int]) -> None:
    train = TrainConfig(stage="text", max_steps=20, micro_batch_size_per_gpu="auto", global_batch_size=size)
    assert micro_batch.candidates(train, ranks) == expected


def test_any_cut_is_the_same_global_batch() -> None:
    for settings in ({"global_batch_size": 64}, {"gradient_accumulation_steps": 2}):
        train = {"stage": "text", "max_steps": 20, "micro_batch_size_per_gpu": 4} | settings
        config = recipe(1).model_copy(update={"train": TrainConfig(**train)})
        for size in (1, 2, 8):
            cut = micro_batch.with_micro_batch(config, size, RANKS)
            assert cut.train.micro_batch_size == size
            assert cut.train.samples_per_step(RANKS) == 64


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0.9 * 60 / 3), ("cuda:0", 0.9 * 80)])
def test_what_a_rank_may_use(monkeypatch: pytest.MonkeyPatch, device: str, expected: float) -> None:
    """A GPU's memory; of a host's free memory the part of each of its ranks, here 3 of 4."""
    machine = SimpleNamespace(available_memory=lambda: 60, total_memory=lambda index: 80)
    monkeypatch.setattr(micro_batch, "get_accelerator", lambda: machine)
    monkeypatch.setattr(distributed, "gather", lambda host: [host, host, "another", host])
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: values)
    assert socket.gethostname() != "another"
    assert micro_batch.usable_bytes(torch.device(device)) == int(expected)


def test_the_ranks_agree_on_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(total_memory=lambda index: 80 * 2**30)
    monkeypatch.setattr(micro_batch, "get_accelerator", lambda: machine)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: [max(*values, -7)])
    assert micro_batch.usable_bytes(torch.device("cuda:0")) == 7
