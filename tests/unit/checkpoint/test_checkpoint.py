"""Which checkpoints are kept, and which weights a run may start from."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import real_accelerator
from zero3_files import complete_by_hand

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.load import check_start, restore_random_state
from mirage_ds.checkpoint.save import random_state
from mirage_ds.errors import CheckpointError
from mirage_ds.recipe import load_config
from mirage_ds.zero3 import distributed

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage2.yaml"


def test_pruning_counts_complete_ones_and_keeps_other_folders(tmp_path: Path) -> None:
    """Damaged ones do not count; later ones were skipped and are kept; so is a folder of another name."""
    for name in ("global_step100", "global_step500", "global_step550", "global_step600", "global_step1000", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
        if name != "global_step550":
            complete_by_hand(tmp_path / name)
    complete.prune(tmp_path, step=600, keep_latest_k=2)
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"global_step500", "global_step550", "global_step600", "global_step1000", "mine"}
    complete.prune(tmp_path, step=600, keep_latest_k=1)
    assert {path.name for path in complete.tags(tmp_path)} == {"global_step600", "global_step1000"}


def test_what_cannot_be_deleted_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A protected checkpoint, or one that a reader on NFS holds open; a link is unlinked, and its target stays."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "run.json").touch()
        complete_by_hand(tmp_path / f"global_step{step}")
    (tmp_path / "archive").mkdir()
    (tmp_path / "global_step2").rename(tmp_path / "archive" / "2")
    (tmp_path / "global_step2").symlink_to(tmp_path / "archive" / "2")

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for _ in range(2):
        complete.prune(tmp_path, step=4, keep_latest_k=2)
    assert {path.name for path in complete.tags(tmp_path)} == {"global_step4", "global_step3", "global_step1"}
    assert (tmp_path / "archive" / "2" / "run.json").exists()
    said = capfd.readouterr().err
    assert said.count("WARNING") == 1
    assert f"was not deleted ({tmp_path}/global_step1): Directory not empty; the run continues" in said


def test_a_damaged_checkpoint_of_the_same_step_that_cannot_be_deleted_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("global_step5", "global_step5.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(name)
    complete_by_hand(tmp_path / "global_step5.part")
    monkeypatch.setattr(shutil, "rmtree", lambda path: os.unlink("/nowhere/none"))
    complete.publish(tmp_path / "global_step5.part")
    assert (tmp_path / "global_step5" / "run.json").read_text() == "global_step5.part"
    assert [path.name for path in complete.tags(tmp_path)] == ["global_step5"]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "latent_size", 8, "trained with latent_size 8, .* set model.latent_size=8"),
    ],
)
def test_weights_of_another_latent_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str | None, key: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = load_config(RECIPE, [f"run.init_from={tmp_path}"])
    facts: dict[str, Any] = {"world_size": 2, "config": config.model_dump(mode="json")}
    folder = tmp_path / "checkpoints" / "global_step3"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    complete_by_hand(folder)
    check_start(tmp_path, config)
    (facts["config"][section] if section else facts)[key] = value
    (folder / "run.json").write_text(json.dumps(facts))
    complete_by_hand(folder)
    with pytest.raises(CheckpointError, match=message):
        check_start(tmp_path, config)


def test_an_adapter_in_another_dtype_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype is named, not the base."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    overrides = [f"run.init_from={tmp_path}", "train.dtype=fp32"]
    folder = tmp_path / "checkpoints" / "global_step3"
    folder.mkdir(parents=True)
    for lora in ([], ["model.lora.rank=8"]):
        config = load_config(RECIPE, overrides + lora)
        (folder / "run.json").write_text(json.dumps({"world_size": 2, "config": config.model_dump(mode="json")}))
        complete_by_hand(folder)
        check_start(tmp_path, config)
        other = load_config(RECIPE, [*overrides, *lora, "train.dtype=bf16"])
        if not lora:
            check_start(tmp_path, other)
            continue
        with pytest.raises(CheckpointError, match=r"train\.dtype=fp32, this run has train\.dtype=bf16"):
            check_start(tmp_path, other)


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        check_start(tmp_path, load_config(RECIPE))


class Gpu:
    """Of DeepSpeed's accelerators, the part that draws random numbers."""

    def __init__(self, state: int) -> None:
        self.state = torch.tensor([state])

    def device_name(self) -> str:
        return "cuda"

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state


def test_random_states_of_the_host_and_of_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_accelerator, "ds_accelerator", Gpu(7))
    states = random_state()
    drawn, new = torch.rand(3), Gpu(8)
    monkeypatch.setattr(real_accelerator, "ds_accelerator", new)
    restore_random_state(states)
    assert torch.equal(torch.rand(3), drawn)
    assert new.state.item() == 7


def test_random_states_on_the_cpu_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu, as in these tests; the GPU, which others may use, is not touched. So resumes on the CPU
    a run that was saved on GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)
    states = random_state()
    assert set(states) == {"cpu"}
    drawn = torch.rand(3)
    restore_random_state(states | {"cuda": torch.tensor([7])})
    assert torch.equal(torch.rand(3), drawn)
