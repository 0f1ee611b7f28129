"""The dry run's samples, what counts as a lack of memory, and its line for the log; real starts: tests/distributed/."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_samples import random_sample

from mirage_ds.data.encode import EncodedSample
from mirage_ds.errors import DataError
from mirage_ds.recipe import load_config
from mirage_ds.sizing.workload import Shape, Workload
from mirage_ds.training import dry_run
from mirage_ds.training.dry_run import (
    costliest_first,
    costliest_row,
    describe_lack,
    describe_success,
    is_out_of_memory,
    take,
)
from mirage_ds.zero3 import distributed

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.mark.parametrize(
    ("numbers", "taken"),
    [([4, 2, 0, 1], [4, 2, 0]), ([3, 4, 3, 2, 1], [4, 2, 1]), ([2, 3], [2, 2, 2])],
    ids=["costliest first", "unusable ones left out", "too few"],
)
def test_which_samples_are_taken(monkeypatch: pytest.MonkeyPatch, numbers: list[int], taken: list[int]) -> None:
    """Sample 3 cannot be used. That is for the run to meet, even with data.on_fault=stop, which the recipe has."""

    def encode(number: int) -> EncodedSample:
        if number == 3:
            raise DataError("the image cannot be decoded (a/3)")
        return random_sample(number, stage="stage1")

    monkeypatch.setattr(dry_run, "FoldersReader", lambda shards, **_: lambda number, **_: number)
    config = load_config(RECIPE, ["train.micro_batch_size_per_gpu=3"])
    batch = take(config, SimpleNamespace(shards=None, encoder=encode), numbers, 3)
    assert batch.keys == [random_sample(number, stage="stage1").key for number in taken]


@pytest.mark.parametrize(
    ("setting", "hides"),
    [
        ("model.train_tower=false", False),
        ("model.answer_sees_image=false", True),
        ("data.text_dropout_image=0.1", True),
    ],
)
def test_images_are_hidden_where_the_run_may_hide_them(
    monkeypatch: pytest.MonkeyPatch, setting: str, hides: bool
) -> None:
    monkeypatch.setattr(dry_run, "FoldersReader", lambda shards, **_: lambda number, **_: number)
    config = load_config(RECIPE, ["train.micro_batch_size_per_gpu=2", setting])
    encode = partial(random_sample, stage="stage1")
    batch = take(config, SimpleNamespace(shards=None, encoder=encode), [1, 2], 2)
    assert len(batch.hide_columns) == 2 * hides


def test_the_rows_that_pad_the_others_come_first() -> None:
    """Of a micro-batch that is aligned at its latent blocks."""
    columns = [((50, 50), (4,)), ((90, 5), (4,)), ((10, 80), (4,)), ((60, 45), (4,))]
    for stage, size, expected in (
        ("stage1", 2, [3, 0, 1, 2]),
        ("stage2", 1, [3, 0, 1, 2]),
        ("stage2", 2, [1, 2, 3, 0]),
    ):
        config = load_config(RECIPE, [f"train.micro_batch_size_per_gpu={size}", f"train.stage={stage}"])
        assert costliest_first(rows_of(columns), lambda row: row.tokens, config) == expected


def test_the_costliest_micro_batch_has_the_most_passes() -> None:
    """A pass costs as much as many columns: short rows with many latents, in different blocks, come first."""
    columns = [((300, 100), (2,)), ((20, 20), (9,)), ((20, 10, 20), (1, 9)), ((200, 150), (2,)), ((50, 50), (8,))]
    config = load_config(RECIPE, ["train.micro_batch_size_per_gpu=2", "train.stage=stage2"])
    numbers = costliest_first(rows_of(columns), lambda row: row.tokens + 60 * row.latents, config)
    assert numbers[:2] == [2, 1]
    assert sorted(numbers) == [0, 1, 2, 3, 4]


def rows_of(columns: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Workload:
    """Of these stretches and latent blocks."""
    shapes = [Shape(*each, targets=0, patches=0, numbers=number) for number, each in enumerate(columns)]
    return Workload(shapes, len(columns), "")


PACKING = ["data.packing=true", "data.token_budget=100"]


def test_a_packed_row_of_the_costliest_samples() -> None:
    """The most per token first, as long as they fit, and no more than another rank leaves."""
    lengths, costs = [50, 40, 30, 20, 10], [50, 90, 70, 20, 30]
    assert costliest_row(costs, lengths, budget=100, most=9) == [4, 2, 1, 3]
    assert costliest_row(costs, lengths, budget=60, most=9) == [4, 2, 3]
    assert costliest_row(costs, lengths, budget=100, most=2) == [4, 2]


def test_a_packed_row_is_taken_as_the_run_packs_it() -> None:
    samples = [random_sample(number, stage="stage1") for number in range(3)]
    start = SimpleNamespace(shards=None, encoder=samples.__getitem__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "FoldersReader", lambda shards, **_: lambda number, **_: number)
        batch = take(load_config(RECIPE, PACKING), start, [2, 0], 2)
    assert batch.input_ids.shape == (1, len(samples[2].input_ids) + len(samples[0].input_ids))
    assert batch.sample_ends is not None


def test_what_to_set_where_a_packed_row_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = load_config(RECIPE, [*PACKING, "train.micro_batch_size_per_gpu=4"])
    message = describe_lack(torch.OutOfMemoryError("no room"), config, SimpleNamespace(input_ids=torch.zeros(1, 90)), 1)
    assert "does not fit into memory (data.token_budget=100, rank 0 on " in message
    assert "GiB; use a smaller data.token_budget, or " in message
    assert "micro_batch" not in message


def errors() -> Iterator[tuple[RuntimeError, bool]]:
    with pytest.raises(RuntimeError) as no_memory:  # the allocator's own words
        torch.empty(2**60, dtype=torch.uint8)
    yield no_memory.value, True
    yield torch.OutOfMemoryError(""), True
    yield RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True
    yield RuntimeError("Connection closed by peer [127.0.0.1]:1"), False
    yield RuntimeError("shape '[2]' is invalid for input of size 3"), False


def test_what_is_a_lack_of_memory() -> None:
    for error, expected in errors():
        assert is_out_of_memory(error) == expected, error


def test_a_smaller_micro_batch_keeps_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recipe that gives the global batch by its parts; each part of the message is there."""
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = load_config(RECIPE, ["train.micro_batch_size_per_gpu=4", "train.gradient_accumulation_steps=3"])
    batch = SimpleNamespace(input_ids=torch.zeros(4, 30))
    message = describe_lack(torch.OutOfMemoryError("CUDA out of memory."), config, batch, 7 * 2**30)
    assert "does not fit into memory (train.micro_batch_size_per_gpu=4, rank 3 on " in message
    assert "): CUDA out of memory.; the run may meet" in message
    assert "here 30 columns, and its estimate is 7.0 GiB; use " in message
    smaller = "train.micro_batch_size_per_gpu=2 with train.global_batch_size=24 with "
    assert f"{smaller}train.gradient_accumulation_steps=null, or distributed.deepspeed_config=" in message


def test_a_gpus_peak_is_shown_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(max_memory_allocated=lambda: 61.2 * 2**30, total_memory=lambda index: 79.6 * 2**30)
    monkeypatch.setattr(dry_run, "get_accelerator", lambda: gpu)
    batch = SimpleNamespace(keys=["a/1", "a/2"], input_ids=torch.zeros(2, 30))
    words = "dry run: the costliest micro-batch fits (samples: 2, columns: 30)"
    assert describe_success(batch, torch.device("cpu"), 0) == words
    on_gpu = describe_success(batch, torch.device("cuda:0"), int(58.8 * 2**30))
    assert on_gpu == f"{words}: peak 61.2 of 79.6 GiB, planned 58.8"
