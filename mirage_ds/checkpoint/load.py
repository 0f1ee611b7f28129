"""Loads a checkpoint into this run's engine: everything to resume, or only the weights to start from."""

from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from mirage_ds.checkpoint import reshard
from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.checkpoint.find import require_latest
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.model.lora import has_adapter
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed


def resume(engine: DeepSpeedEngine, checkpoint: Path) -> TrainState:
    """Loads everything, so that the run continues with its next step. The number of ranks may have changed."""
    facts = read_facts(checkpoint / FACTS_NAME)
    state = TrainState(step=facts["step"], position=facts["position"])
    if facts["world_size"] == distributed.world_size():
        restore_random_state(_load(engine, checkpoint)["random"])
        return state
    # Each rank keeps the random state of its seed: a step draws no random numbers.
    reshard.load_weights(engine, checkpoint, facts["world_size"])
    updates = reshard.load_optimizer(engine, checkpoint, facts["world_size"])
    engine.global_steps, engine.global_samples = state.step, state.position
    engine.skipped_steps = state.step - updates
    return state


def restore_random_state(states: dict[str, torch.Tensor]) -> None:
    """Sets this rank's random generators to `states`, as `save.random_state` returns them.

    A run that was saved on another kind of device keeps this device's own state.
    """
    torch.set_rng_state(states["cpu"])
    accelerator = get_accelerator()
    if accelerator.device_name() in states:
        accelerator.set_rng_state(states[accelerator.device_name()])


def check_start(run_dir: Path, config: Config) -> None:
    """Refuses to start from weights that were trained with another latent_size or adapter, or one in another dtype.

    Raises:
        CheckpointError: the run has no checkpoint, or another latent_size, or `model.lora` differs, or `train.dtype`
            with one.
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
    lora = config.model.lora and config.model.lora.model_dump(mode="json")
    before = facts["config"]["model"].get("lora")
    if lora != before:
        names = [f"model.lora={each}" if each else "no model.lora" for each in (before, lora)]
        raise CheckpointError(
            f"{checkpoint} was trained with {names[0]}, and this run has {names[1]} (run.init_from={run_dir}); both "
            "must agree; set the same, or export that run (with --merge, if it has an adapter) and set model.path to "
            "the exported folder, without run.init_from"
        )
    dtype = facts["config"]["train"]["dtype"]
    if lora is not None and dtype != config.train.dtype:
        raise CheckpointError(
            f"{checkpoint} was trained with train.dtype={dtype}, this run has train.dtype={config.train.dtype} "
            f"(run.init_from={run_dir}); an adapter fits its base as it was rounded; set train.dtype={dtype}, or "
            "export that run with --merge and set model.path to the exported folder, without run.init_from"
        )


def load_weights(engine: DeepSpeedEngine, run_dir: Path) -> None:
    """Loads only the weights of a run's last checkpoint, trained and frozen ones."""
    checkpoint = require_latest(run_dir)
    reshard.load_weights(engine, checkpoint, read_facts(checkpoint / FACTS_NAME)["world_size"])


def _load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    # Not strict of an adapter, whose base is not in the checkpoint: that all trained parameters are is checked there.
    strict = not has_adapter(engine.module)
    loaded, client_state = engine.load_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, load_module_strict=strict
    )
    if loaded is None:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({checkpoint}); expected the files that the run wrote; use another one"
        )
    return client_state
