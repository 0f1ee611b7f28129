"""Exports of real two-rank ZeRO-3 checkpoints against the engine that saved them: weights and logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import export_worker
import launching
import pytest
import torch
from generated_rows import write_rows
from transformers import Qwen2_5_VLForConditionalGeneration

from mirage_ds.checkpoint.find import find_named
from mirage_ds.checkpoint.partitions import stored_parameters
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny

RUNS: dict[str, dict[str, Any]] = {
    "untied": {"train": {"stage": "stage2", "dtype": "fp32"}},
    "tied": {"train": {"stage": "stage1", "dtype": "fp32"}},
    "tower": {"train": {"stage": "stage1", "dtype": "fp32"}, "model": {"train_tower": True}},
    "bf16": {"train": {"stage": "stage2", "dtype": "bf16"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, deepspeed_configs: dict[str, str]) -> Path:
    """A folder with every run and what its engine computed, from one start of two ranks."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny(write_rows(folder / "rows"), folder / "model", seed=0)
    shutil.copytree(folder / "model", folder / "model-tied")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "model-tied")
    sub_groups = json.loads(Path(deepspeed_configs["plain"]).read_text())
    sub_groups["zero_optimization"]["sub_group_size"] = 60_000
    (folder / "deepspeed.json").write_text(json.dumps(sub_groups))
    wanted = [settings(folder, name) for name in RUNS]
    with launching.start(2, wanted, folder, main=export_worker.main, log=folder / "log") as ranks:
        ranks.finish(timeout_s=1200)
    return folder


def settings(folder: Path, name: str) -> dict[str, Any]:
    own = RUNS[name]
    return {
        "name": name,
        "run": {"dir": str(folder / name)},
        "model": {"path": str(folder / ("model-tied" if name == "tied" else "model"))} | own.get("model", {}),
        "data": {"shards": "unused"},
        "train": {"max_steps": 3, "warmup_steps": 0, "lr": 1e-3} | own["train"],
        "distributed": {"deepspeed_config": str(folder / "deepspeed.json")},
    }


@pytest.fixture(scope="module", params=list(RUNS))
def export(request: pytest.FixtureRequest, runs: Path) -> tuple[Path, Any]:
    """An export's folder, and what export_worker.py stored of the run."""
    output = runs / "exports" / request.param
    export_checkpoint(runs / request.param, output, max_shard_size="1MB")
    return output, torch.load(runs / f"{request.param}.pt")


def load(folder: Path) -> Any:
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def test_weights_are_the_engines_bit_for_bit(export: tuple[Path, Any]) -> None:
    """In bf16 too: a master rounded to bf16 is what the run computes with."""
    folder, kept = export
    loaded = dict(load(folder).named_parameters())
    assert loaded.keys() == kept["parameters"].keys()
    for name, parameter in kept["parameters"].items():
        assert loaded[name].dtype == parameter.dtype
        assert torch.equal(loaded[name], parameter), name


def test_training_changed_what_is_trained(runs: Path, export: tuple[Path, Any]) -> None:
    """So that equal weights above are not those that the run started from."""
    folder, kept = export
    started = dict(load(runs / ("model-tied" if folder.name == "tied" else "model")).named_parameters())
    assert started.keys() == kept["parameters"].keys()
    same = {name for name, value in kept["parameters"].items() if torch.equal(value, started[name].to(value.dtype))}
    frozen = set() if folder.name == "tower" else {name for name in started if name.startswith("model.visual.")}
    if folder.name == "bf16":  # a step may be too small for bf16
        assert frozen <= same < started.keys()
    else:
        assert same == frozen


def logits_of(model: Any, kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers computes positions and image embeddings itself."""
    image_pads = kept["input_ids"] == model.config.image_token_id
    assert image_pads.any()
    with torch.no_grad():
        output = model(
            input_ids=kept["input_ids"],
            attention_mask=kept["attention_mask"],
            pixel_values=kept["pixel_values"],
            image_grid_thw=kept["image_grid_thw"],
            mm_token_type_ids=image_pads.int(),
        )
    logits: torch.Tensor = output.logits
    return logits


def test_logits_are_the_trainers(export: tuple[Path, Any]) -> None:
    folder, kept = export
    model = load(folder)
    logits = logits_of(model, kept)
    assert logits.shape == kept["logits"].shape
    assert kept["logits"].std() > 0.1
    if folder.name != "bf16":
        torch.testing.assert_close(logits, kept["logits"], rtol=0, atol=1e-5)
        return
    # Another order of summation rounds differently: ours is as near to float32 as transformers' own two are.
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    eager = logits_of(model, kept)
    exact = logits_of(model.float(), kept)
    own, *theirs = ((each - exact).abs() for each in (kept["logits"], logits, eager))
    print("bf16 against float32: ours, transformers' with sdpa, with eager: mean, largest")
    print(*(f"{error.mean():.2e}, {error.max():.2e}" for error in (own, *theirs)), sep="; ")
    assert own.mean() < 1.05 * max(error.mean() for error in theirs)
    assert own.max() < 1.5 * max(error.max() for error in theirs)


def test_a_bf16_run_keeps_its_masters_in_fp32(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "bf16", tmp_path / "out", dtype="fp32")
    masters = dict(load(tmp_path / "out").named_parameters())
    kept = torch.load(runs / "bf16.pt")["parameters"]
    assert all(parameter.dtype == torch.float32 for parameter in masters.values())
    assert all(torch.equal(masters[name].bfloat16(), kept[name]) for name in kept)
    finer = {name for name in kept if not torch.equal(masters[name], kept[name].float())}
    assert finer == {name for name in kept if not name.startswith("model.visual.")}


def test_the_checkpoint_really_has_several_sub_groups(runs: Path) -> None:
    """Of each of the two parameter groups, on both ranks."""
    for rank in range(2):
        (file,) = (runs / "untied" / "checkpoints" / "global_step3").glob(f"zero_pp_rank_{rank}_*_optim_states.pt")
        assert len(torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]) > 4
    stored = stored_parameters(find_named(runs / "untied"), 2)
    assert {len(parameter.pieces) for parameter in stored.values()} == {2}
