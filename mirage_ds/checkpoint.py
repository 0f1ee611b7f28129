"""What a run must keep to go on: engine, position, random state, configuration. Save, prune, load, start from.

RUN/checkpoints/global_step20/...        DeepSpeed's files; each rank's random state is in its own
RUN/checkpoints/global_step20/run.json   step, position, ranks, configuration, the manifest's digest
RUN/checkpoints/latest                   the tag of the last complete one
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from mirage_ds import distributed, reshard
from mirage_ds.config import Config
from mirage_ds.engine import whole_numel
from mirage_ds.errors import CheckpointError, DiskFullError
from mirage_ds.trainer import TrainState

FOLDER = "checkpoints"
FACTS_NAME = "run.json"
ADAM_BYTES = 12  # per trained element, all float32: the master and AdamW's two moments


def describe(config: Config, deepspeed_config: dict[str, Any], manifest_digest: str, max_steps: int) -> dict[str, Any]:
    """What a checkpoint says of its run; compared when a run goes on."""
    world_size = distributed.world_size()
    return {
        "world_size": world_size,
        "global_batch_size": config.train.samples_per_step(world_size),
        "max_steps": max_steps,
        "manifest_digest": manifest_digest,
        "deepspeed": deepspeed_config,
        "config": config.model_dump(mode="json"),
    }


def save(engine: DeepSpeedEngine, config: Config, state: TrainState, facts: dict[str, Any]) -> None:
    """Writes a checkpoint of all ranks, then deletes the oldest beyond `checkpoint.keep_latest_k`.

    Raises:
        CheckpointError: there is no room for it.
        DiskFullError: the room ended while it was written, or a quota did.
    """
    folder, tag = config.run.dir / FOLDER, f"global_step{state.step}"
    check_room(config.run.dir, engine.module, engine.device)
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state={"random": random_state()}, save_latest=False)
    except RuntimeError as error:
        # torch.save's writer in C++ does not pass on the system's reason.
        if "inline_container" not in str(error):
            raise
        raise DiskFullError(
            f"the checkpoint could not be written whole ({folder / tag}): {error}; it needs room on the disk and in "
            f"the user's quota; {_remedy(config.run.dir)} (what is there of this one may be deleted)"
        ) from error
    distributed.barrier()
    if distributed.is_main():
        position = {"step": state.step, "position": state.position}
        (folder / tag / FACTS_NAME).write_text(json.dumps(position | facts, indent=2) + "\n")
        # `latest` comes last and at once, so that a checkpoint that is being written is never taken for a whole one.
        mark = folder / "latest.new"
        mark.write_text(tag)
        mark.replace(folder / "latest")
        prune(folder, state.step, config.checkpoint.keep_latest_k)
    distributed.barrier()


def size_in_bytes(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint of all ranks, but for some KiB: what is trained, with AdamW's state, and what is frozen.

    Under ZeRO-3 every rank writes its shards of both.
    """
    return sum(
        whole_numel(parameter) * (ADAM_BYTES if parameter.requires_grad else parameter.element_size())
        for parameter in model.parameters()
    )


def check_room(run_dir: Path, model: torch.nn.Module, device: torch.device) -> None:
    """Refuses to begin a checkpoint that the disk cannot hold; every rank calls it, and all agree.

    Raises:
        CheckpointError: it names the folder and both sizes.
    """
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, size_in_bytes(model)
    if any(distributed.max_over_ranks([free < needed], device)):
        raise CheckpointError(
            f"no room for a checkpoint ({run_dir / FOLDER}): it takes {needed / 1e6:.1f} MB, the disk has "
            f"{free / 1e6:.1f} MB free; one more than checkpoint.keep_latest_k must fit at a time; {_remedy(run_dir)}"
        )


def _remedy(run_dir: Path) -> str:
    """What to do about a full disk."""
    found = latest(run_dir)
    if found is None:
        return "free some space, or set run.dir to a folder on another disk, and start again"
    return f"free some space, and go on from {found.name}, which is whole, with run.resume=auto"


def prune(folder: Path, step: int, keep_latest_k: int) -> None:
    """Deletes checkpoints of steps up to `step`, all but the last ones.

    A later one may be there: half written, by a run that was killed and went on from an earlier checkpoint.
    """
    names = (path.name.removeprefix("global_step") for path in folder.glob("global_step*"))
    steps = sorted(int(name) for name in names if name.isdecimal() and int(name) <= step)
    for old in steps[:-keep_latest_k]:
        shutil.rmtree(folder / f"global_step{old}")


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def latest(run_dir: Path) -> Path | None:
    """The last complete checkpoint of a run, if it has one."""
    mark = run_dir / FOLDER / "latest"
    return mark.parent / mark.read_text().strip() if mark.is_file() else None


def find_latest(run_dir: Path) -> Path:
    """The last complete checkpoint of a run that must have one.

    Raises:
        CheckpointError: there is none.
    """
    found = latest(run_dir)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint ({run_dir / FOLDER}); allowed is the folder of a run that has saved one; "
            "give that run's run.dir, or run it first"
        )
    return found


def find(path: Path) -> Path:
    """The checkpoint that a user names: itself, or by its run's folder, whose last complete one it then is.

    Raises:
        CheckpointError: neither is there.
    """
    found = path if (path / FACTS_NAME).is_file() else latest(path)
    if found is None:
        raise CheckpointError(
            f"no complete checkpoint ({path}); allowed is a run's folder that has {FOLDER}/latest, or one checkpoint "
            f"there, {FOLDER}/global_stepN with its run.json; name one of these"
        )
    return found


def read_facts(file: Path) -> dict[str, Any]:
    """What a checkpoint, or a run without one, says of its run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read ({file.parent}): {error}; allowed is what the run wrote there; "
            "put it back, or take another checkpoint, or a new run.dir"
        ) from error
    return facts


def resume(engine: DeepSpeedEngine, checkpoint: Path) -> TrainState:
    """Loads everything; the next step is the one that would have come. The number of ranks may be another one."""
    facts = read_facts(checkpoint / FACTS_NAME)
    state = TrainState(step=facts["step"], position=facts["position"])
    if facts["world_size"] == distributed.world_size():
        client_state = _load(engine, checkpoint)
        torch.set_rng_state(client_state["random"]["cpu"])
        if "cuda" in client_state["random"]:
            torch.cuda.set_rng_state(client_state["random"]["cuda"])
        return state
    # Each rank's random state stays as its seed made it: nothing that a step computes is drawn at random.
    reshard.load_weights(engine, checkpoint, facts["world_size"])
    updates = reshard.load_optimizer(engine, checkpoint, facts["world_size"])
    engine.global_steps, engine.global_samples = state.step, state.position
    engine.skipped_steps = state.step - updates
    return state


def check_start(run_dir: Path, config: Config) -> None:
    """Refuses to start from weights of another kind.

    Raises:
        CheckpointError: no checkpoint, or another latent_size.
    """
    checkpoint = find_latest(run_dir)
    facts = read_facts(checkpoint / FACTS_NAME)
    stage, latent_size = facts["config"]["train"]["stage"], facts["config"]["model"]["latent_size"]
    if stage != "text" and latent_size != config.model.latent_size:
        raise CheckpointError(
            f"{checkpoint} was trained with latent_size {latent_size}, model.latent_size is {config.model.latent_size} "
            f"(run.init_from={run_dir}); both must agree; set model.latent_size={latent_size}, or start from another "
            "run"
        )


def load_weights(engine: DeepSpeedEngine, run_dir: Path) -> None:
    """Loads the weights of a run's last checkpoint, trained and frozen ones, and nothing else of it."""
    checkpoint = find_latest(run_dir)
    reshard.load_weights(engine, checkpoint, read_facts(checkpoint / FACTS_NAME)["world_size"])


def _load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({checkpoint}); its files must be those that the run wrote; "
            "start from another one"
        )
    return client_state
