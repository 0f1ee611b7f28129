"""LoRA without its package."""

import pytest

from mirage_ds.config_lora import Lora
from mirage_ds.errors import ConfigError
from mirage_ds.model.lora import add_lora, peft_config
from mirage_ds.self_check import tiny_backbone


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only where a run starts: for the planner and the exporter too."""
    monkeypatch.setattr("mirage_ds.config_lora.find_spec", {"peft": None}.__getitem__)
    lora = Lora(rank=8)
    with pytest.raises(ConfigError, match=r"peft is not installed .*install mirage_ds with its extra"):
        peft_config(lora)
    with pytest.raises(ConfigError, match="peft is not installed"):
        add_lora(tiny_backbone(), lora, [1, 2, 3], seed=0)
