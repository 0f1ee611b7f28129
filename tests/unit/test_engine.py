"""One owner for every number: how ds_configs/*.json and the run's configuration become DeepSpeed's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_configs
from mirage_ds.config import Config, load_config
from mirage_ds.engine import choose_gather, parameter_groups, resolve_deepspeed_config
from mirage_ds.errors import ConfigError

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
SHIPPED = Path(ds_configs.__path__[0])


def config(*overrides: str) -> Config:
    return load_config(RECIPE, list(overrides))


@pytest.mark.parametrize("name", ["zero3.json", "zero3_offload.json"])
def test_shipped_files_leave_no_auto_and_no_default_that_changes_results(name: str) -> None:
    overrides = (
        "train.gradient_clipping=0",
        "train.micro_batch_size_per_gpu=3",
        f"distributed.deepspeed_config={name}",
    )
    resolved = resolve_deepspeed_config(config(*overrides))
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_micro_batch_size_per_gpu"] == 3
    assert resolved["gradient_accumulation_steps"] == 1  # the trainer sets the boundary
    assert resolved["gradient_clipping"] == 0  # DeepSpeed's default clips at 1.0
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["bf16"]["enabled"] is False
    assert resolve_deepspeed_config(config("train.dtype=bf16"))["bf16"]["enabled"] is True


def changed(path: Path, **changes: Any) -> str:
    content = json.loads((SHIPPED / "zero3.json").read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return f"distributed.deepspeed_config={path}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0\.5 there, but the run's configuration makes it 1\.0"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8 there"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True there"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer or scheduler section .* delete the section"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is not 3"),
        ({"communication_data_type": None}, "communication_data_type is not set"),
        ({"data_types": None}, "data_types.grad_accum_dtype is not set"),
    ],
)
def test_a_file_that_disagrees_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_deepspeed_config(config(changed(tmp_path / "ds.json", **changes)))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(distributed.deepspeed_config=zero4.json\)"):
        resolve_deepspeed_config(config("distributed.deepspeed_config=zero4.json"))


@pytest.mark.parametrize(
    ("wanted", "stage", "chosen"),
    [
        ("auto", "text", "layer"),
        ("auto", "stage1", "layer"),
        ("auto", "stage2", "rollout"),
        ("layer", "stage2", "layer"),
        ("rollout", "stage1", "rollout"),
    ],
)
def test_what_is_gathered_at_a_time(wanted: str, stage: str, chosen: str) -> None:
    overridden = config(f"model.gather={wanted}", f"train.stage={stage}")
    assert choose_gather(overridden.model, overridden.train.stage) == chosen


def test_norms_and_biases_do_not_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    module[0].weight.requires_grad_(False)
    decayed, kept = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 4)]
    assert kept["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in kept["params"]] == [(4,), (4,), (4,)]
