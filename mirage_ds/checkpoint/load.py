"""A checkpoint -> this run's engine: everything to resume, or the weights alone to start from."""

from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from mirage_ds.checkpoint import reshard
from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.checkpoint.find import require_latest
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed


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
    checkpoint = require_latest(run_dir)
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
    checkpoint = require_latest(run_dir)
    reshard.load_weights(engine, checkpoint, read_facts(checkpoint / FACTS_NAME)["world_size"])


def _load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({checkpoint}); its files must be those that the run wrote; "
            "start from another one"
        )
    return client_state
