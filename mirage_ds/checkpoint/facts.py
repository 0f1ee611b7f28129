"""What a run must keep to go on: engine, position, random state, configuration. Save, prune, load, start from.

RUN/checkpoints/global_step20/...        DeepSpeed's files; each rank's random state is in its own
RUN/checkpoints/global_step20/run.json   step, position, ranks, configuration, the manifest's digest
RUN/checkpoints/global_step20/files.json names, sizes and sha256 of all these; see complete.py
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mirage_ds.checkpoint import complete, reshard
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.training.trainer import TrainState
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import whole_numel

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


class Writer(TorchCheckpointEngine):
    """Writes this rank's files for DeepSpeed, and checks each.

    It keeps an error to itself, so that this rank stays in DeepSpeed's collectives and all ranks can end together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, Any]] = {}  # as in files.json
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        file = Path(path)
        try:
            torch.save(state_dict, file)
            self.files[file.name] = complete.check_written(file)
        except (OSError, RuntimeError) as error:
            # torch's writer in C++ does not pass on the system's reason.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            self.error = f"{file.name}: {error}"
            file.unlink(missing_ok=True)


def save(engine: DeepSpeedEngine, config: Config, state: TrainState, facts: dict[str, Any]) -> Path:
    """Writes a checkpoint of all ranks and returns it; then the oldest beyond `checkpoint.keep_latest_k` are deleted.

    It has another name until every rank's files are on the disk and checked.

    Raises:
        CheckpointError: on every rank: there is no room for it, or one of them could not write its files.
    """
    started_s = time.monotonic()
    folder, tag = config.run.dir / FOLDER, f"global_step{state.step}"
    part = folder / (tag + complete.PART)
    _on_main(part, lambda: complete.remove_parts(folder))
    check_room(config.run.dir, engine.module, engine.device)
    usual, writer = engine.checkpoint_engine, Writer()
    engine.checkpoint_engine = writer
    try:
        client_state = {"random": random_state()}
        engine.save_checkpoint(str(folder), tag=part.name, client_state=client_state, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
    outcomes = distributed.gather((writer.files, writer.error))
    _refuse_part(part, [error for _, error in outcomes])
    files = {name: entry for own, _ in outcomes for name, entry in own.items()}
    position = {"step": state.step, "position": state.position}
    _on_main(part, lambda: _make_current(part, position | facts, files, config.checkpoint.keep_latest_k))
    if distributed.is_main():
        size, passed_s = complete.total_bytes(files.values()), time.monotonic() - started_s
        rate = size / 1e6 / passed_s
        print(f"saved {folder / tag}: {size / 1e6:.1f} MB in {passed_s:.1f} s, {rate:.1f} MB/s", flush=True)
    return folder / tag


def _make_current(part: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]], keep_latest_k: int) -> None:
    """What rank 0 does once every rank's files are there: `files` are theirs."""
    own = part / FACTS_NAME
    own.write_text(json.dumps(facts, indent=2) + "\n")
    listing = files | {FACTS_NAME: complete.describe_file(own)}
    (part / complete.FILES_NAME).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")
    final = complete.publish(part)
    mark = final.parent / "latest.new"
    mark.write_text(final.name)
    mark.replace(final.parent / "latest")
    complete.prune(final.parent, facts["step"], keep_latest_k)


def _on_main(part: Path, action: Callable[[], None]) -> None:
    """Rank 0 acts, all ranks wait for it, and all end if the system refuses.

    Raises:
        CheckpointError: on every rank.
    """
    error = None
    if distributed.is_main():
        try:
            action()
        except OSError as refused:
            error = str(refused)
    _refuse_part(part, distributed.gather(error))


def _refuse_part(part: Path, errors: list[str | None]) -> None:
    """Deletes a checkpoint that a rank could not write, and says so; `errors` are those of all ranks."""
    failed = {rank: error for rank, error in enumerate(errors) if error}
    if not failed:
        return
    if distributed.is_main():
        shutil.rmtree(part, ignore_errors=True)
    rank, error = next(iter(failed.items()))
    raise CheckpointError(
        f"the checkpoint could not be written whole ({part}): rank {rank}: {error}; it needs room on the disk and in "
        f"the user's quota; {_remedy(part.parents[1])}"
    )


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
    free = shutil.disk_usage(existing).free + complete.parts_bytes(run_dir / FOLDER)  # save deletes these first
    needed = size_in_bytes(model)
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


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is complete by names and sizes, if it has one."""
    return next((path for path in complete.tags(run_dir / FOLDER) if complete.wrong_size(path) is None), None)


def find_whole(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None if it never saved one; damaged ones are named and passed over.

    Every rank calls it, and all get the same answer, whatever their number: they share the reading of the files.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    found = distributed.gather(complete.tags(run_dir / FOLDER))[0]  # as rank 0 sees the folder
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if distributed.is_main():
            print(f"WARNING: {checkpoint} is damaged and passed over: {damage}", flush=True)
    if found:
        raise CheckpointError(
            f"no checkpoint of the run is whole ({run_dir / FOLDER}): {', '.join(path.name for path in found)} are "
            "damaged; a run goes on from a whole one; copy one there again (from checkpoint.copy_to, if it was set), "
            "or start anew with another run.dir"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by names, sizes and sha256; every rank calls it, and all get the same answer."""
    own = slice(distributed.rank(), None, distributed.world_size())
    damages = distributed.gather(complete.wrong_size(checkpoint) or complete.wrong_content(checkpoint, own))
    return next((damage for damage in damages if damage), None)


def find_latest(run_dir: Path) -> Path:
    """The last checkpoint of a run that must have one; it is complete by names and sizes.

    Raises:
        CheckpointError: there is none, or it is damaged: an earlier one has other weights than the user means.
    """
    found = complete.tags(run_dir / FOLDER)
    if not found:
        raise CheckpointError(
            f"there is no complete checkpoint ({run_dir / FOLDER}); allowed is the folder of a run that has saved one; "
            "give that run's run.dir, or run it first"
        )
    refuse(found[0], complete.wrong_size(found[0]))
    return found[0]


def refuse(checkpoint: Path, damage: str | None) -> None:
    """Raises:
    CheckpointError: a checkpoint that a user named has a damage.
    """
    if damage is not None:
        raise CheckpointError(
            f"the checkpoint is damaged ({checkpoint}): {damage}; allowed is what the run wrote; copy it there again, "
            "name another one, or delete it to have the one before it taken"
        )


def find(path: Path) -> Path:
    """The checkpoint that a user names: itself, or by its run's folder, whose last one it then is. It is whole.

    Raises:
        CheckpointError: neither is there, or a file of it is missing or not what the run wrote.
    """
    found = [path] if (path / FACTS_NAME).is_file() else complete.tags(path / FOLDER)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint ({path}); allowed is a run's folder that has saved one, or one checkpoint "
            f"there, {FOLDER}/global_stepN with its run.json; name one of these"
        )
    refuse(found[0], complete.wrong_size(found[0]) or complete.wrong_content(found[0]))
    return found[0]


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
