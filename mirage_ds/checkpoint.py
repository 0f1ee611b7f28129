"""What a run keeps: the engine's shards, the position in the data, the configuration. Save, prune, start from.

RUN/checkpoints/global_step20/...   DeepSpeed's files
RUN/checkpoints/global_step20/run.json   step, position, ranks, latent_size, the manifest's digest
RUN/checkpoints/latest   the tag of the last complete one
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from mirage_ds import distributed
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.trainer import TrainState

FOLDER = "checkpoints"


def save(engine: DeepSpeedEngine, config: Config, state: TrainState, manifest_digest: str) -> None:
    """Writes a checkpoint of all ranks, then deletes the oldest beyond `checkpoint.keep_latest_k`."""
    folder, tag = config.run.dir / FOLDER, f"global_step{state.step}"
    facts = asdict(state) | {
        "world_size": distributed.world_size(),
        "latent_size": config.model.latent_size,
        "stage": config.train.stage,
        "manifest_digest": manifest_digest,
    }
    # `latest` comes last, so that a checkpoint that is being written is never taken for a complete one.
    engine.save_checkpoint(str(folder), tag=tag, client_state=facts, save_latest=False)
    if distributed.is_main():
        (folder / tag / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        latest = folder / "latest.new"
        latest.write_text(tag)
        latest.replace(folder / "latest")
        for old in _tags(folder)[: -config.checkpoint.keep_latest_k]:
            shutil.rmtree(old)
    distributed.barrier()


def _tags(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))


def find_latest(run_dir: Path) -> Path:
    """The last complete checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    folder = run_dir / FOLDER
    try:
        return folder / (folder / "latest").read_text().strip()
    except OSError as error:
        raise CheckpointError(
            f"there is no complete checkpoint ({folder}); allowed is the folder of a run that has saved one; "
            "give that run's run.dir, or run it first"
        ) from error


def check_start(run_dir: Path, config: Config) -> None:
    """Refuses to start from weights of another kind.

    Raises:
        CheckpointError: no checkpoint, another number of ranks, or another latent_size.
    """
    checkpoint = find_latest(run_dir)
    facts: dict[str, Any] = json.loads((checkpoint / "run.json").read_text())
    if facts["world_size"] != distributed.world_size():
        raise CheckpointError(
            f"{checkpoint} was saved by {facts['world_size']} ranks, this run has {distributed.world_size()} "
            f"(run.init_from={run_dir}); the shards of a checkpoint fit the same number of ranks; "
            f"start {facts['world_size']} ranks"
        )
    if facts["stage"] != "text" and facts["latent_size"] != config.model.latent_size:
        raise CheckpointError(
            f"{checkpoint} was trained with latent_size {facts['latent_size']}, model.latent_size is "
            f"{config.model.latent_size} (run.init_from={run_dir}); both must agree; "
            f"set model.latent_size={facts['latent_size']}, or start from another run"
        )


def load_weights(engine: DeepSpeedEngine, run_dir: Path) -> None:
    """Loads the float32 masters of a run's last checkpoint, and nothing else of it: the optimizer starts anew."""
    checkpoint = find_latest(run_dir)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in _groups(engine)]
    # DeepSpeed keeps ZeRO-3's weights with the optimizer's state, so both are loaded and the state is dropped.
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({checkpoint}); its files must be those that the run wrote; "
            "start from another one"
        )
    engine.optimizer.optimizer.state.clear()
    for group, own in zip(_groups(engine), settings, strict=True):
        group.update(own)
    engine.global_steps = engine.global_samples = engine.micro_steps = engine.skipped_steps = 0


def _groups(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    return engine.optimizer.optimizer.param_groups
