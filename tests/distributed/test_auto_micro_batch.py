"""`micro_batch_size_per_gpu: auto` and the dry run in a real start: the choice by a limit, a rank that lacks memory."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import launching
import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.mirage import MirageModel
from mirage_ds.recipe import load_config
from mirage_ds.sizing import micro_batch
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"


def train(limit_bytes: int, most_rows: int, *arguments: str) -> None:
    """The trainer on ranks of which each may use `limit_bytes`, and the second computes at most so many rows."""
    forward = MirageModel.forward

    @functools.wraps(forward)
    def limited(self: MirageModel, batch: Any, **more: Any) -> Any:
        of_the_run = torch.distributed.is_initialized()  # the self-check comes before
        if of_the_run and distributed.rank() == 1 and len(batch.keys) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines of torch")
        return forward(self, batch, **more)

    with (
        mock.patch.object(micro_batch, "usable_bytes", return_value=limit_bytes),
        mock.patch.object(MirageModel, "forward", limited),
    ):
        launching.train(*arguments)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=8, maxsize=10**9)
    return folder


def overrides(ground: Path, name: str, size: int | str) -> list[str]:
    return [
        *(f"model.path={ground / 'model'}", f"data.shards={ground / 'shards'}", f"run.dir={ground / name}"),
        *("train.gradient_accumulation_steps=null", "train.global_batch_size=8", "train.max_steps=4"),
        *("train.warmup_steps=1", f"train.micro_batch_size_per_gpu={size}"),
    ]


def peak(ground: Path, size: int) -> int:
    """The estimate for a micro-batch of `size` on 2 ranks."""
    config = load_config(RECIPE, overrides(ground, "any", size))
    settings = resolve_deepspeed_config(config)
    return estimate_memory(model_sizes(config.model), config, settings, workload(config).largest_of(size), 2).peak


def test_a_rank_without_memory_ends_the_run_before_its_first_step(ground: Path, tmp_path: Path) -> None:
    """auto takes 2 of 1, 2 and 4, as the limit says; the second rank has no memory for 2, and names what to set."""
    arguments = (peak(ground, 2), 1, str(RECIPE), *overrides(ground, "refused", "auto"))
    with launching.start(2, *arguments, main=train, log=tmp_path / "log") as ranks:
        code = ranks.wait(timeout_s=300)
    log = (tmp_path / "log").read_text()
    assert "micro-batch 2 (auto: 4 would need " in log
    assert (code, log.count("error: "), log.count("Traceback")) == (2, 1, 0), log
    for words in (
        "error: the costliest micro-batch does not fit into memory (train.micro_batch_size_per_gpu=2, rank 1 on ",
        "): CUDA out of memory. Tried to allocate 2.00 GiB.; ",
        "; use train.micro_batch_size_per_gpu=1, or distributed.deepspeed_config=zero3_offload.json, or more GPUs",
    ):
        assert words in log
    assert "dry run: " not in log
    metrics = ground / "refused" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()
