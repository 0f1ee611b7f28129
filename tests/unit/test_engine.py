"""One owner for every number: how ds_configs/*.json and the run's configuration become DeepSpeed's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import ds_configs
from mirage_ds.config import Config, load_config
from mirage_ds.engine import DEEPSPEED_KEYS, choose_gather, parameter_groups, resolve_deepspeed_config
from mirage_ds.errors import ConfigError
from mirage_ds.model import backbone

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
        ({"optimizer": {"type": "AdamW"}}, r"optimizer stands there .* delete it there and set train\.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler stands there .* set train\.warmup_steps"),
        ({"train_batch_size": 8}, r"train_batch_size stands there .* set train\.global_batch_size"),
        ({"fp16": {"enabled": True}}, r"fp16 stands there .* set train\.dtype"),
        ({"gradient_cliping": 1.0}, "unknown key gradient_cliping .*did you mean 'gradient_clipping'"),
        ({"bf16": {"enable": True}}, r"unknown key bf16\.enable .*did you mean 'enabled'"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"unknown key data_types\.grad_acum.*'grad_accum_dtype'"),
        ({"bf16": True}, r"bf16 is True .* a section in braces"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "did you mean 'stage3_max_live_parameters'",
        ),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, r"reduce_bucket_size is 'big' .*integer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, r"offload_param\.devise .*'device'"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, r'reduce_bucket_size is "auto" .*delete'),
        ({"comms_logger": {"on": True}}, r"unknown key comms_logger\.on"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is not 3"),
        ({"communication_data_type": None}, "communication_data_type is not set"),
        ({"data_types": None}, "data_types.grad_accum_dtype is not set"),
    ],
)
def test_a_file_that_disagrees_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_deepspeed_config(config(changed(tmp_path / "ds.json", **changes)))


class Asked(dict):
    """Remembers the keys that somebody asks for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_deepspeed_reads_every_key_that_is_allowed() -> None:
    """It says nothing of a key that it does not read, so a slip in our own list would pass without a word."""
    asked = Asked(resolve_deepspeed_config(config()))
    DeepSpeedConfig(asked)
    assert set(DEEPSPEED_KEYS) <= asked.asked


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(ConfigError, match="the file holds no JSON object"):
        resolve_deepspeed_config(config(f"distributed.deepspeed_config={tmp_path}/ds.json"))


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


@pytest.mark.parametrize("wanted", ["auto", "sdpa"])
def test_attention_without_flash_attn(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """On a GPU in bf16 too; there `auto` takes flash-attn as soon as it is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    assert backbone.choose_attention(wanted, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(backbone, "find_spec", lambda name: name)
    assert backbone.choose_attention(wanted, torch.float32) == "sdpa"
    assert backbone.choose_attention(wanted, torch.bfloat16) == {"auto": "flash_attention_2", "sdpa": "sdpa"}[wanted]
