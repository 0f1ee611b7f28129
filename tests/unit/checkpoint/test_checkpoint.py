"""Which checkpoints are kept, and which weights a run may start from."""

import json
from pathlib import Path
from typing import Any

import pytest
from zero3_files import complete_by_hand

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.load import check_start
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


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        check_start(tmp_path, load_config(RECIPE))
