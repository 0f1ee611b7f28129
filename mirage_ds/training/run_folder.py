"""The run's folder: whether a run starts or resumes there, what it was started with, and what changed since.

RUN/owner/           see mirage_ds/owner.py
RUN/config.yaml      the resolved configuration of the last start
RUN/deepspeed.json   DeepSpeed's configuration with nothing left on "auto"
RUN/versions.json    packages and git commit of the last start
RUN/first_start.json see goodput.py
RUN/checkpoints/     see checkpoint/save.py
RUN/metrics.jsonl, RUN/validation.jsonl, RUN/tensorboard/
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.checkpoint.find import find_undamaged, require_latest
from mirage_ds.config import Config, TrainConfig
from mirage_ds.errors import CheckpointError, MirageError, OwnerError, name_unwritable
from mirage_ds.owner import POLL_S, Owner, of_run
from mirage_ds.paths import without_secrets
from mirage_ds.training import early_end
from mirage_ds.training.folder_checks import check_folder_is_free
from mirage_ds.training.goodput import note_first_start
from mirage_ds.versions import versions
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import learning_rate

# What a resumed run may change: it leaves every step's loss as it is, up to rounding. The global batch size and the
# manifest's digest are compared by themselves.
HARMLESS = (
    "run.dir",
    "run.init_from",
    "run.save_before_end_s",
    "model.cache_dir",
    "model.cache_targets",
    "model.cache_targets_gib",
    "model.attention",
    "model.gather",
    "model.gather_layers",
    "model.activation_checkpointing",
    "data.shards",
    "data.num_workers",
    "data.max_length",
    "data.packing",
    "data.token_budget",
    "data.read_timeout_s",
    "data.cache_dir",
    "data.cache_gib",
    "data.on_fault",
    "data.balance",
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
# What older runs did, whose checkpoints do not have these keys.
MEANT_BEFORE = {
    "data.exif_orientation": False,
    "data.balance": False,
    "data.helper": True,
    "data.shuffle": "full",
    "data.shuffle_window": 16,
    "data.packing": False,
    "data.text_dropout_image": 0.0,
    "model.answer_sees_image": True,
    "model.cache_targets_gib": 64.0,
    "model.train_merger": False,
    "model.freeze": [],
    "model.gather_layers": 4,
}
# What `run.resume=extend` may change too, if the run becomes longer by it.
LENGTH = ("train.max_steps", "train.epochs")
UNWRITABLE_REMEDY = "set run.dir to a folder where you may write"
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
        CheckpointError: the run there has other settings that decide its losses, or all its checkpoints are damaged,
            or there is none to extend.
    """
    folder, extends = config.run.dir, config.run.resume == "extend"
    check_folder_is_free(config.run)  # again: another start may have written since the early check
    found = find_undamaged(folder)
    if found is None:  # a run that ended before its first checkpoint leaves nothing to resume: this one starts over
        if extends:
            require_latest(folder)
        return None
    before = read_facts(found / FACTS_NAME)
    changed = check_same_run(found / FACTS_NAME, facts, may_extend=extends)
    if distributed.is_main():
        if changed:
            print("changed since the last start: " + "; ".join(changed), flush=True)
        if before["max_steps"] != facts["max_steps"]:
            print(describe_extension(config.train, before, facts["max_steps"]), flush=True)
    return found


def describe_extension(train: TrainConfig, before: dict[str, Any], max_steps: int) -> str:
    """What a longer run does next: its position, and how its learning rate differs from that of the shorter one.

    Args:
        before: the facts of the checkpoint that it resumes from.
        max_steps: the new length.
    """
    step, old_steps = before["step"], before["max_steps"]
    last = learning_rate(max(step, 1), old_steps, train)
    following = learning_rate(step + 1, max_steps, train)
    return (
        f"extended from {old_steps} to {max_steps} steps: continues with step {step + 1}, at sample "
        f"{before['position']} of the order; the schedule (train.lr_decay={train.lr_decay}) is now that of {max_steps} "
        f"steps: the learning rate was {last:.3g} in step {step} and is {following:.3g} in step {step + 1}"
    )


@contextmanager
def own(run_dir: Path, seen: list[Path]) -> Iterator[Owner | None]:
    """This start is the only one that writes to the folder; every rank enters, rank 0 gets the owner.

    Args:
        seen: the checkpoints from which rank 0 chose the one to resume from.

    Raises:
        OwnerError: on every rank: another start writes there, or has written since.
    """
    owner, answer = (of_run(run_dir) if distributed.is_main() else None), "wait"
    while answer == "wait":
        answer = distributed.gather(claim(owner) if owner else "")[0]
        if answer == "wait":
            time.sleep(POLL_S)
    if answer:
        raise OwnerError(answer)
    try:
        if distributed.gather(complete.tags(run_dir / complete.FOLDER) == seen)[0]:
            yield owner
        else:
            raise OwnerError(
                f"another start has written checkpoints meanwhile (run.dir={run_dir}), and has ended; a run has one "
                "writer; start again, with run.resume=auto to continue from them"
            )
    finally:
        if owner:
            owner.release()
            with suppress(OSError):  # it stays if the run has written anything
                run_dir.rmdir()


def claim(owner: Owner) -> str:
    """One try: "" for success, "wait", or the message of the refusal."""
    try:
        return "" if owner.try_to_claim() else "wait"
    except MirageError as error:
        return str(error)


def write_folder(config: Config, facts: dict[str, Any], began: float) -> None:
    """Creates the folder and writes into it what runs. Every rank calls it, after all checks.

    Args:
        began: when this start began, in seconds since the epoch.
    """
    folder = config.run.dir
    distributed.barrier()  # every rank has checked the folder before rank 0 writes
    if distributed.is_main():
        with name_unwritable(folder, UNWRITABLE_REMEDY):
            (folder / complete.FOLDER).mkdir(parents=True, exist_ok=True)
            early_end.unmark(folder)
            note_first_start(folder, began)
            (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            (folder / "deepspeed.json").write_text(json.dumps(facts["deepspeed"], indent=2) + "\n")
            (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def check_same_run(file: Path, facts: dict[str, Any], *, may_extend: bool = False) -> list[str]:
    """Compares a checkpoint with the run that is to resume; returns the harmless changes.

    Args:
        file: run.json of the checkpoint.
        may_extend: the run may be longer than before.

    Raises:
        CheckpointError: with every change that is not harmless.
    """
    before = read_facts(file)
    old, new = MEANT_BEFORE | flatten(before["config"]), flatten(facts["config"])
    keys = [*new, *(key for key in old if key.startswith("model.lora.") and key not in new)]
    changes = {
        key: f"{key}: {without_secrets(repr(old.get(key)))} -> {without_secrets(repr(new.get(key)))}"
        for key in keys
        if old.get(key) != new.get(key)
    }
    changes.pop("run.resume", None)  # set in order to resume
    longer = may_extend and facts["max_steps"] >= before["max_steps"]
    # An adapter's base is compared by the digest of its weights.
    moved_base = ("model.path",) if facts["config"]["model"]["lora"] else ()
    patterns = HARMLESS + moved_base + (LENGTH if longer else ())
    harmless = [text for key, text in changes.items() if any(fnmatch(key, pattern) for pattern in patterns)]
    harmful = [text for text in changes.values() if text not in harmless]
    _check_order(file, before, facts)
    if before["world_size"] != facts["world_size"]:
        harmless.append(f"ranks: {before['world_size']} -> {facts['world_size']}")
    for key in ("global_batch_size", "manifest_digest", "max_steps"):
        if before[key] != facts[key] and not (longer and key == "max_steps"):
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
            "to start from these weights); a longer run alone is possible with run.resume=extend"
        )
    return harmless


def _check_order(file: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises: CheckpointError: the samples that are left would come in another order than the first ones did."""
    old, new = before.get("order", 1), facts["order"]
    if old != new and 0 < before["step"] < facts["max_steps"]:
        raise CheckpointError(
            f"the run was started by a version that orders samples otherwise (in {file.parent}): order {old}, at "
            f"sample {before['position']}; this version has order {new}, in which other samples would be left; finish "
            "the run with the version that started it (its commit is in versions.json of the run), or start a new run "
            "from its weights, with run.init_from and a run.dir of its own"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
