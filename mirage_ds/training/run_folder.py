"""The run's folder: whether a run starts or resumes there, what it was started with, and what changed since.

RUN/start.json       what a run that resumes here is compared with
RUN/config.yaml      the resolved configuration of the last start
RUN/deepspeed.json   DeepSpeed's configuration with nothing left on "auto"
RUN/versions.json    packages and git commit of the last start
RUN/checkpoints/     see checkpoint/save.py
RUN/metrics.jsonl, RUN/validation.jsonl, RUN/tensorboard/
"""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.checkpoint.find import find_undamaged
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError, name_unwritable
from mirage_ds.training import early_end
from mirage_ds.training.early_checks import check_folder_is_free
from mirage_ds.versions import versions
from mirage_ds.zero3 import distributed

START_NAME = "start.json"

# What a resumed run may change: it leaves every step's loss as it is, up to rounding. The global batch size and the
# manifest's digest are compared by themselves.
HARMLESS = (
    "run.dir",
    "run.init_from",
    "run.save_before_end_s",
    "model.cache_dir",
    "model.attention",
    "model.gather",
    "model.activation_checkpointing",
    "data.shards",
    "data.num_workers",
    "data.max_length",
    "train.micro_batch_size_per_gpu",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
    "train.log_freq",
    "train.max_skipped_steps",
    "train.deterministic",
    "train.profile_steps",
    "checkpoint.*",
    "evaluation.*",
    "distributed.*",
    "launch.*",
)
# Parts of the DeepSpeed JSON that change results; what its other parts decide does not.
DEEPSPEED_MATHEMATICS = ("data_types", "communication_data_type")


def find_start(config: Config, facts: dict[str, Any]) -> Path | None:
    """Whether the run starts in its folder or resumes there; writes nothing.

    Args:
        facts: what a checkpoint of this run would say of itself, see `describe_run`.

    Returns:
        The newest intact checkpoint, to resume from, or None for a new run.

    Raises:
        ConfigError: the folder holds a run, and `run.resume` is `never`.
        CheckpointError: the run there has other settings that decide its losses, or all its checkpoints are damaged.
    """
    folder = config.run.dir
    check_folder_is_free(config.run)  # again: another start may have written since the early check
    found = find_undamaged(folder)
    changed = []
    if found or (folder / "metrics.jsonl").exists():  # a run that ended before its first checkpoint has metrics alone
        changed = check_same_run(found / FACTS_NAME if found else folder / START_NAME, facts)
    if changed and distributed.is_main():
        print("changed since the last start: " + "; ".join(changed), flush=True)
    return found


def write_folder(config: Config, facts: dict[str, Any]) -> None:
    """Creates the folder and writes into it what runs. Every rank calls it, after all checks."""
    folder = config.run.dir
    distributed.barrier()  # every rank has checked the folder before rank 0 writes
    if distributed.is_main():
        with name_unwritable(folder, "set run.dir to a folder where you may write"):
            folder.mkdir(parents=True, exist_ok=True)
        early_end.unmark(folder)
        (folder / START_NAME).write_text(json.dumps(facts, indent=2) + "\n")
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        (folder / "deepspeed.json").write_text(json.dumps(facts["deepspeed"], indent=2) + "\n")
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def check_same_run(file: Path, facts: dict[str, Any]) -> list[str]:
    """Compares a checkpoint, or a run without one, with the run that is to resume; returns the harmless changes.

    Raises:
        CheckpointError: with every change that is not harmless.
    """
    before = read_facts(file)
    old, new = flatten(before["config"]), flatten(facts["config"])
    changes = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in new if old.get(key) != new[key]}
    changes.pop("run.resume", None)  # set in order to resume
    harmless = [text for key, text in changes.items() if any(fnmatch(key, pattern) for pattern in HARMLESS)]
    harmful = [text for text in changes.values() if text not in harmless]
    if before["world_size"] != facts["world_size"]:
        harmless.append(f"ranks: {before['world_size']} -> {facts['world_size']}")
    for key in ("global_batch_size", "manifest_digest", "max_steps"):
        if before[key] != facts[key]:
            harmful.append(f"{key}: {before[key]!r} -> {facts[key]!r}")
    if before["global_batch_size"] != facts["global_batch_size"]:
        size = before["global_batch_size"]
        harmful.append(f"train.global_batch_size={size} keeps the global batch with any number of ranks")
    for key in DEEPSPEED_MATHEMATICS:
        if before["deepspeed"].get(key) != facts["deepspeed"].get(key):
            harmful.append(f"{key}: {before['deepspeed'].get(key)!r} -> {facts['deepspeed'].get(key)!r}")
    if harmful:
        lines = "\n".join(f"  - {text}" for text in harmful)
        raise CheckpointError(
            f"the run was started with another configuration (in {file.parent}):\n{lines}\na resumed run keeps what "
            "decides its losses; undo these changes, or give the changed run a run.dir of its own (with run.init_from "
            "to start from these weights)"
        )
    return harmless


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
