"""The run's folder: whether a run starts or goes on there, what it was started with, and what changed since.

RUN/config.yaml      the resolved configuration of the last start
RUN/deepspeed.json   DeepSpeed's configuration with nothing left on "auto"
RUN/versions.json    packages and git commit of the last start
RUN/checkpoints/     see checkpoint.py
RUN/metrics.jsonl, RUN/validation.jsonl, RUN/tensorboard/
"""

import json
import subprocess
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mirage_ds import checkpoint, distributed
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError, ConfigError

# What a resumed run may change: it leaves every step's loss as it is, up to rounding. The global batch size and the
# manifest's digest are compared by themselves.
HARMLESS = (
    "run.dir",
    "run.init_from",
    "run.resume",
    "model.cache_dir",
    "model.attention",
    "model.gather",
    "model.activation_checkpointing",
    "data.shards",
    "data.num_workers",
    "data.max_length",
    "train.micro_batch_size_per_gpu",
    "train.gradient_accumulation_steps",
    "train.log_freq",
    "train.deterministic",
    "train.profile_steps",
    "checkpoint.*",
    "evaluation.*",
    "distributed.*",
)
# Parts of the DeepSpeed JSON that change results; what its other parts decide does not.
DEEPSPEED_MATHEMATICS = ("data_types", "communication_data_type")


def open_folder(config: Config, facts: dict[str, Any]) -> Path | None:
    """Makes the folder or takes it up again; every rank calls it.

    Args:
        facts: what a checkpoint of this run would say of itself, see `checkpoint.describe`.

    Returns:
        The checkpoint to go on from, or None for a new run.

    Raises:
        ConfigError: the folder holds a run, and `run.resume` does not say to go on with it.
        CheckpointError: the run there was started with another mathematics.
    """
    folder = config.run.dir
    taken = (folder / "metrics.jsonl").exists()
    found = checkpoint.latest(folder) if config.run.resume == "auto" else None
    if taken and config.run.resume == "never":
        raise ConfigError(
            f"the folder holds another run already (run.dir={folder}); a run needs a folder of its own; set run.dir to "
            "a new one, or run.resume=auto to go on with that run"
        )
    if found is not None:
        changed = check_same_run(found, facts)
        if changed and distributed.is_main():
            print("changed since the last start: " + "; ".join(changed), flush=True)
    distributed.barrier()  # every rank has looked before rank 0 writes
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        (folder / "deepspeed.json").write_text(json.dumps(facts["deepspeed"], indent=2) + "\n")
        (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    return found


def check_same_run(found: Path, facts: dict[str, Any]) -> list[str]:
    """Compares a checkpoint with the run that wants to go on from it; returns the harmless changes.

    Raises:
        CheckpointError: with every change that is not harmless.
    """
    before = checkpoint.read_facts(found)
    old, new = flatten(before["config"]), flatten(facts["config"])
    changes = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in new if old.get(key) != new[key]}
    harmless = [text for key, text in changes.items() if any(fnmatch(key, pattern) for pattern in HARMLESS)]
    harmful = [text for text in changes.values() if text not in harmless]
    for key in ("world_size", "global_batch_size", "manifest_digest", "max_steps"):
        if before[key] != facts[key]:
            harmful.append(f"{key}: {before[key]!r} -> {facts[key]!r}")
    for key in DEEPSPEED_MATHEMATICS:
        if before["deepspeed"].get(key) != facts["deepspeed"].get(key):
            harmful.append(f"{key}: {before['deepspeed'].get(key)!r} -> {facts['deepspeed'].get(key)!r}")
    if harmful:
        lines = "\n".join(f"  - {text}" for text in harmful)
        raise CheckpointError(
            f"the run was started with another configuration (in {found}):\n{lines}\na run that goes on keeps what "
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


def versions() -> dict[str, str]:
    """What runs: packages, and the commit of the code, with a mark if there are uncommitted changes."""
    packages = {name: version(name) for name in ("mirage_ds", "torch", "deepspeed", "transformers")}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git here, or no checkout
        commit = "unknown"
    return packages | {"git_commit": commit}
