"""The cases of the distributed tests run in two starts: one of 2 ranks, one of 1 rank, at the same time."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import golden_set
import pytest
import torch
from cases import DEEP_LAYERS, Outcome, all_cases, read_outcome, start_cases
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parents[2]
# See tests/interpreted/conftest.py.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_kernels.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The golden set's model, one of the same shape with tied embeddings, and one with as many layers as the 7B."""
    folder = tmp_path_factory.mktemp("models")
    config = AutoConfig.from_pretrained(golden_set.MODEL)
    torch.manual_seed(0)
    config.tie_word_embeddings = True
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "tied")
    config.text_config.num_hidden_layers = DEEP_LAYERS
    config.text_config.layer_types = ["full_attention"] * DEEP_LAYERS
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "deep")
    return {"untied": golden_set.MODEL, "tied": str(folder / "tied"), "deep": str(folder / "deep")}


@pytest.fixture(scope="session")
def deepspeed_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """ds_configs/zero3.json with limits so small that a small model is really sharded, gathered and prefetched.

    In `logged` no weight stays gathered between two uses, as in a model far larger than the live-parameter limits, and
    DeepSpeed logs its communication. `shipped` has the shipped limits, a reuse distance that is as
    small beside this model as the shipped one beside the 3B, and logs too.
    """
    folder = tmp_path_factory.mktemp("ds_configs")
    shipped, offload = (
        json.loads((ROOT / "ds_configs" / name).read_text()) for name in ("zero3.json", "zero3_offload.json")
    )
    small = {
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_param_persistence_threshold": 0,
    }
    nothing_stays = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    logged = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}}
    short = {"stage3_max_reuse_distance": 1000}
    kinds = {
        "plain": shipped | {"zero_optimization": shipped["zero_optimization"] | small},
        "bf16-communication": shipped
        | {"zero_optimization": shipped["zero_optimization"] | small, "communication_data_type": "bf16"},
        "hpz": shipped | {"zero_optimization": shipped["zero_optimization"] | small | {"zero_hpz_partition_size": 2}},
        "offload": offload | {"zero_optimization": offload["zero_optimization"] | small},
        "logged": shipped | {"zero_optimization": shipped["zero_optimization"] | small | nothing_stays} | logged,
        "shipped": shipped
        | {"zero_optimization": shipped["zero_optimization"] | {"stage3_param_persistence_threshold": 0} | short}
        | logged,
    }
    for name, content in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in kinds}


@pytest.fixture(scope="session")
def outcome(
    models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """Runs every case once; returns the outcome of each by name."""
    folder = tmp_path_factory.mktemp("cases")
    with ExitStack() as stack:
        starts = all_cases(models, deepspeed_configs).items()
        for each in [stack.enter_context(start_cases(ranks, cases, folder)) for ranks, cases in starts]:
            each.finish(timeout_s=1500)
    return partial(read_outcome, folder)
