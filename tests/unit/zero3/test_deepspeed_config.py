"""One owner for every number: DeepSpeed's configuration from ds_configs/*.json and the run's configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

import ds_configs
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import load_config
from mirage_ds.zero3.deepspeed_config import DEEPSPEED_KEYS, resolve_deepspeed_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
SHIPPED = Path(ds_configs.__path__[0])


def config(*overrides: str) -> Config:
    return load_config(RECIPE, list(overrides))


def test_the_base_of_an_adapter_is_in_memory(tmp_path: Path) -> None:
    """Its weights are compared with those of a checkpoint."""
    content = json.loads((SHIPPED / "zero3.json").read_text())
    for device in ("cpu", "nvme"):
        content["zero_optimization"]["offload_param"] = {"device": device, "nvme_path": str(tmp_path)}
        (tmp_path / f"{device}.json").write_text(json.dumps(content))
    with_adapter = "model.lora.rank=8"
    resolve_deepspeed_config(config(f"distributed.deepspeed_config={tmp_path}/nvme.json"))
    resolve_deepspeed_config(config(f"distributed.deepspeed_config={tmp_path}/cpu.json", with_adapter))
    with pytest.raises(ConfigError, match=r"offload_param\.device is nvme with model\.lora .*allowed: cpu or none"):
        resolve_deepspeed_config(config(f"distributed.deepspeed_config={tmp_path}/nvme.json", with_adapter))


@pytest.mark.parametrize("name", ["zero3.json", "zero3_offload.json", "zero3_tiny.json"])
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
        ({"gradient_clipping": 0.5}, r"gradient_clipping is 0\.5 in the file, but 1\.0 in the run's configuration"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8 in the file"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True in the file"),
        ({"optimizer": {"type": "AdamW"}}, r"optimizer must not be set .* delete it there and set train\.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler must not be set .* set train\.warmup_steps"),
        ({"train_batch_size": 8}, r"train_batch_size must not be set .* set train\.global_batch_size"),
        ({"fp16": {"enabled": True}}, r"fp16 must not be set .* set train\.dtype"),
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
        ({"communication_data_type": None}, "communication_data_type is None .*allowed: fp32, bf16"),
        ({"communication_data_type": "fp99"}, "communication_data_type is 'fp99'"),
        ({"data_types": None}, r"data_types\.grad_accum_dtype is None"),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, r"data_types\.grad_accum_dtype is 'fp99'"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_deepspeed_config(config(changed(tmp_path / "ds.json", **changes)))


class RecordingDict(dict):
    """Remembers the keys that are read."""

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
    """DeepSpeed silently ignores a key that it does not read, so a mistake in our list would not be noticed."""
    asked = RecordingDict(resolve_deepspeed_config(config()))
    DeepSpeedConfig(asked)
    assert set(DEEPSPEED_KEYS) <= asked.asked


def test_a_file_that_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(ConfigError, match="the file is not a JSON object"):
        resolve_deepspeed_config(config(f"distributed.deepspeed_config={tmp_path}/ds.json"))


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(distributed.deepspeed_config=zero4.json\)"):
        resolve_deepspeed_config(config("distributed.deepspeed_config=zero4.json"))
