"""The planned packed row bounds every packing, and a mask has its place in memory."""

from itertools import chain, combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_ds.config import Config
from mirage_ds.recipe import load_config
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.micro_batch import choose
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.workload import Row, packed_row
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "qwen2.5-vl-3b-stage1.yaml"
SAMPLES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 400)), min_size=1, max_size=7)


@given(SAMPLES, st.integers(50, 120))
def test_no_packing_is_larger(samples: list[tuple[int, int, int]], budget: int) -> None:
    """Against every choice of samples that fits."""
    bound = packed_row([Row(*sample) for sample in samples], budget, masked=False)
    assert bound.tokens == budget
    choices = chain.from_iterable(combinations(samples, size) for size in range(1, len(samples) + 1))
    for tokens, targets, patches in (map(sum, zip(*choice, strict=True)) for choice in choices):
        if tokens <= budget:
            assert targets <= bound.targets
            assert patches <= bound.patches


def test_a_row_of_equal_samples_is_filled_with_them() -> None:
    for count in (1, 3):  # one sample as often as it takes
        assert packed_row([Row(10, 4, 8)] * count, 25, masked=True) == Row(25, 10, 20, attended=25)


def packed(budget: int, *overrides: str) -> Config:
    settings = ["data.packing=true", f"data.token_budget={budget}", "train.global_batch_size=64", "data.shards=gone"]
    return load_config(RECIPE, [*settings, *overrides])


def activations(config: Config) -> int:
    settings, sizes = resolve_deepspeed_config(config), model_sizes(config.model)
    return estimate_memory(sizes, config, settings, workload(config).largest, 8).activations


def test_memory_follows_the_budget() -> None:
    """Not the micro-batch. With sdpa the mask is counted, 2 bytes per pair of columns, and repeated keys and values."""
    flash = "model.attention=flash_attention_2"
    sizes = [f"train.micro_batch_size_per_gpu={size}" for size in (1, 4)]
    assert len({activations(packed(8192, size)) for size in sizes}) == 1
    twice = 2 * activations(packed(8192, sizes[0], flash))
    assert activations(packed(16384, sizes[0], flash)) == pytest.approx(twice, rel=1e-4)  # targets are rounded up
    more = activations(packed(8192, sizes[0])) - activations(packed(8192, sizes[0], flash))
    repeated = 8192 * 2 * model_sizes(packed(8192).model).hidden * 2  # of one layer, and its gradient
    assert more == 2 * 8192**2 + 2 * repeated


def test_auto_is_one_packed_row() -> None:
    config = packed(8192, "train.micro_batch_size_per_gpu=auto")
    choice = choose(model_sizes(config.model), config, {}, workload(config), 8, limit_bytes=1)
    assert choice.size == 1
    assert "data.token_budget decides" in str(choice)
