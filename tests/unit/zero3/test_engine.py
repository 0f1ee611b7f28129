"""What is gathered as one unit, which parameters decay, and builds of DeepSpeed's ops."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirage_ds.errors import ConfigError
from mirage_ds.model.mirage import MirageModel
from mirage_ds.recipe import load_config
from mirage_ds.self_check import tiny_backbone
from mirage_ds.zero3 import engine
from mirage_ds.zero3.engine import choose_gather, future_moments, mark_gather_units, parameter_groups

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"


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
    overridden = load_config(RECIPE, [f"model.gather={wanted}", f"train.stage={stage}"])
    assert choose_gather(overridden) == chosen


def test_where_images_are_hidden_the_rollout_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 makes several passes then: with `layer`, no decoder layer may be one unit, as in stage 2."""
    hidden = load_config(RECIPE, ["model.answer_sees_image=false"])
    assert choose_gather(hidden) == "rollout"
    marked: dict[torch.nn.Module, bool] = {}
    monkeypatch.setattr(engine, "set_z3_leaf_module", lambda module, flag: marked.update({module: flag}))
    model = MirageModel(tiny_backbone(), stage="stage1", ce_loss_weight=1.0)
    for setting, one_unit in (("true", True), ("false", False)):
        config = load_config(RECIPE, ["model.gather=layer", f"model.answer_sees_image={setting}"])
        mark_gather_units(model, config)
        assert {marked[layer] for layer in model.rollout.layers} == {one_unit}


def test_norms_and_biases_do_not_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    module[0].weight.requires_grad_(False)
    decayed, kept = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 4)]
    assert kept["weight_decay"] == 0.0
    assert [tuple(parameter.shape) for parameter in kept["params"]] == [(4,), (4,), (4,)]


def test_the_moments_that_the_first_step_will_make() -> None:
    """DeepSpeed makes an engine without them; 8 bytes per trained element, on the device of the masters."""
    masters = [torch.zeros(5), torch.zeros(3)]
    made = torch.optim.AdamW(masters)
    made.state[masters[0]] = {"exp_avg": torch.zeros(5)}
    for optimizer, offload, expected in (
        (torch.optim.AdamW(masters), False, 8 * 8),
        (torch.optim.AdamW(masters), True, 0),
        (made, False, 0),
    ):
        zero = SimpleNamespace(optimizer=optimizer, offload_optimizer=offload, fp32_partitioned_groups_flat=masters)
        moments = future_moments(SimpleNamespace(optimizer=zero))
        assert sum(moment.nbytes for moment in moments) == expected


def test_a_build_that_was_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    engine.wait_for_build("cpu_adam")
    (lock,) = [path / "lock" for path in tmp_path.rglob("cpu_adam")]
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(
        ConfigError, match=r"op cpu_adam has been locked for more than 10 minutes \(.*lock\).*delete it: rm "
    ):
        engine.wait_for_build("cpu_adam")


def test_a_build_that_ends_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    engine.wait_for_build("cpu_adam")
    (lock,) = [path / "lock" for path in tmp_path.rglob("cpu_adam")]
    lock.touch()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), lock.unlink()))
    engine.wait_for_build("cpu_adam")
    assert waits == [1]
