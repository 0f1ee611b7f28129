"""The run's folder: which changes a resumed run may make, which it may not, and what it says of itself."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.errors import CheckpointError
from mirage_ds.recipe import load_config
from mirage_ds.training.run_folder import check_same_run, describe_extension, flatten

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"

# The keys of a checkpoint of commit 14c9b45. Add none: a newer key needs an entry in MEANT_BEFORE, or is harmless.
KEYS_BEFORE = {
    "run": "dir seed init_from resume save_before_end_s",
    "model": """
        path cache_dir latent_size compress_strategy attention gather activation_checkpointing train_tower
        cache_targets cache_targets_gib
    """,
    "data": """
        shards num_workers min_pixels max_pixels system_turn exif_orientation max_length balance packing
        token_budget on_fault
    """,
    "train": """
        stage max_steps epochs micro_batch_size_per_gpu gradient_accumulation_steps global_batch_size lr
        warmup_steps lr_decay warmup_from_zero weight_decay betas eps gradient_clipping max_skipped_steps
        dtype ce_loss_weight latent_loss_weight log_freq deterministic profile_steps
    """,
    "checkpoint": "interval mode verify keep_latest_k copy_to",
    "evaluation": "shards interval max_samples",
    "distributed": "deepspeed_config timeout_s",
    "launch": "max_restarts",
}


@pytest.fixture
def facts() -> dict[str, Any]:
    return {
        "world_size": 2,
        "global_batch_size": 4,
        "max_steps": 20,
        "manifest_digest": "abc",
        "order": 2,
        "deepspeed": {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}},
        "config": load_config(RECIPE).model_dump(mode="json"),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, facts: dict[str, Any]) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"step": 4, "position": 16} | facts))
    return tmp_path / "run.json"


def changed(facts: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(facts)
    node = result
    *sections, last = key.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    return result


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config.data.num_workers", 7),
        ("config.data.read_timeout_s", 120.0),
        ("config.data.cache_dir", "kept"),
        ("config.data.cache_gib", 10.0),
        ("config.model.gather", "layer"),
        ("config.model.cache_targets", "targets"),
        ("config.train.micro_batch_size_per_gpu", 2),
        ("config.checkpoint.interval", 3),
        ("config.run.dir", "moved"),
    ],
)
def test_harmless_changes_pass_and_are_named(checkpoint: Path, facts: dict[str, Any], key: str, value: Any) -> None:
    (text,) = check_same_run(checkpoint, changed(facts, key, value))
    assert text.startswith(key.removeprefix("config."))
    assert str(value) in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_batch_size", 8),
        ("max_steps", 21),
        ("manifest_digest", "def"),
        ("config.train.lr", 0.5),
        ("config.train.stage", "stage2"),
        ("config.model.latent_size", 8),
        ("config.train.weight_decay", 0.0),
        ("config.model.path", "another"),
        ("config.run.seed", 7),
        ("config.data.helper", "gray"),
        ("config.data.shuffle", "window"),
        ("config.data.shuffle_window", 4),
        ("deepspeed.communication_data_type", "bf16"),
    ],
)
def test_other_changes_are_refused_with_both_values(
    checkpoint: Path, facts: dict[str, Any], key: str, value: Any
) -> None:
    both = changed(changed(facts, key, value), "config.data.num_workers", 7)
    with pytest.raises(CheckpointError) as error:
        check_same_run(checkpoint, both)
    assert f"{key.removeprefix('config.').removeprefix('deepspeed.')}: " in str(error.value)
    assert f"-> {value!r}" in str(error.value)
    assert "num_workers" not in str(error.value)


def test_another_adapter_and_none_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    file = tmp_path / "run.json"
    adapter = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all", "train_embeddings": "none"}
    with_adapter = changed(facts, "config.model.lora", adapter)
    for before, after, words in (
        (with_adapter, facts, r"model\.lora\.rank: 8 -> None"),
        (facts, with_adapter, r"model\.lora\.rank: None -> 8"),
        (with_adapter, changed(facts, "config.model.lora", adapter | {"rank": 4}), r"model\.lora\.rank: 8 -> 4"),
    ):
        file.write_text(json.dumps({"step": 4, "position": 16} | before))
        with pytest.raises(CheckpointError, match=words):
            check_same_run(file, after)
    file.write_text(json.dumps({"step": 4, "position": 16} | with_adapter))
    assert check_same_run(file, with_adapter) == []


def test_the_base_of_an_adapter_may_move(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Its weights are compared by their digest."""
    file = tmp_path / "run.json"
    adapter = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all", "train_embeddings": "none"}
    before = changed(facts, "config.model.lora", adapter)
    file.write_text(json.dumps({"step": 4, "position": 16} | before))
    (text,) = check_same_run(file, changed(before, "config.model.path", "moved"))
    assert text.startswith("model.path: ")


def test_a_checkpoint_of_an_older_version_lacks_new_keys(checkpoint: Path, facts: dict[str, Any]) -> None:
    """It resumes if the run does what that version did."""
    before = json.loads(checkpoint.read_text())
    for section, keys in KEYS_BEFORE.items():
        before["config"][section] = {key: before["config"][section][key] for key in keys.split()}
    checkpoint.write_text(json.dumps(before))
    assert all(
        text.startswith(("evaluation.", "data.read_timeout_s", "data.cache_"))
        for text in check_same_run(checkpoint, facts)
    )
    del before["config"]["data"]["exif_orientation"]  # of a version that was older still
    checkpoint.write_text(json.dumps(before))
    check_same_run(checkpoint, changed(facts, "config.data.exif_orientation", False))
    with pytest.raises(CheckpointError, match=r"data\.exif_orientation: False -> True"):
        check_same_run(checkpoint, facts)
    with pytest.raises(CheckpointError, match=r"data\.helper: True -> 'none'"):
        check_same_run(checkpoint, changed(facts, "config.data.helper", "none"))


def test_a_run_of_another_order_is_not_continued(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Unless none or all of its samples were taken."""
    before = json.loads(checkpoint.read_text())
    del before["order"]  # of a version whose checkpoints did not say
    checkpoint.write_text(json.dumps(before))
    with pytest.raises(CheckpointError, match=r"order 1, at sample 16; .* order 2, .*run\.init_from and a run\.dir"):
        check_same_run(checkpoint, facts)
    for taken in ({"step": 0, "position": 0}, {"step": 20, "position": 80}):
        checkpoint.write_text(json.dumps(before | taken))
        assert check_same_run(checkpoint, facts) == []
    with pytest.raises(CheckpointError, match="order 1, at sample 80"):
        check_same_run(checkpoint, changed(facts, "max_steps", 30) | {}, may_extend=True)


@pytest.mark.parametrize("length", [{"max_steps": 30, "epochs": None}, {"max_steps": None, "epochs": 3.0}])
def test_a_longer_run_is_harmless_if_it_is_asked_for(
    checkpoint: Path, facts: dict[str, Any], length: dict[str, Any]
) -> None:
    longer = changed(facts, "max_steps", 30)
    longer["config"]["train"] |= length
    with pytest.raises(CheckpointError, match=r"max_steps: 20 -> 30"):
        check_same_run(checkpoint, longer)
    assert all(text.startswith("train.") for text in check_same_run(checkpoint, longer, may_extend=True))
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        check_same_run(checkpoint, changed(longer, "config.train.lr", 0.5), may_extend=True)
    with pytest.raises(CheckpointError, match=r"max_steps: 20 -> 19"):
        check_same_run(checkpoint, changed(facts, "max_steps", 19), may_extend=True)


def test_an_extension_states_position_and_schedule() -> None:
    """Linear decay over 20 steps ends near 0; over 40 it is back at half of the peak."""
    train = load_config(RECIPE, ["train.lr=1.0", "train.warmup_steps=0"]).train
    text = describe_extension(train, {"step": 20, "position": 80, "max_steps": 20}, 40)
    assert "from 20 to 40 steps: continues with step 21, at sample 80 of the order" in text
    assert f"was {1 / 21:.3g} in step 20 and is {20 / 41:.3g} in step 21" in text


def test_a_checkpoint_without_its_facts_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        check_same_run(tmp_path / "run.json", {})


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_changes_are_printed_without_secrets(checkpoint: Path, facts: dict[str, Any]) -> None:
    new = changed(facts, "config.data.shards", "http://someone:pass@host/x?sig=secret")
    (text,) = check_same_run(checkpoint, new)
    assert "http://host/x" in text
    assert "pass" not in text
    assert "secret" not in text
