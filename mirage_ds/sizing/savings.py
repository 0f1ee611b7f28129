"""Settings that save memory, for the advice of the planner and of the trainer's dry run."""

from collections.abc import Iterator
from typing import Any

from mirage_ds.config import Config
from mirage_ds.zero3.engine import choose_gather


def savings(config: Config) -> Iterator[tuple[str, Config]]:
    """Settings beside the micro-batch that are not in use yet, the cheapest first, each with the changed run."""
    if config.model.activation_checkpointing == "none":
        yield "model.activation_checkpointing=full", _change(config, "model", activation_checkpointing="full")
    if choose_gather(config) == "rollout":
        yield "model.gather=layer", _change(config, "model", gather="layer")
    if config.distributed.deepspeed_config == "zero3.json":
        name = "zero3_offload.json"
        yield f"distributed.deepspeed_config={name}", _change(config, "distributed", deepspeed_config=name)


def _change(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
