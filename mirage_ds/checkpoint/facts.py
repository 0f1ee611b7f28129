"""The facts of a run that are stored in each checkpoint: RUN/checkpoints/global_stepN/run.json."""

import json
from pathlib import Path
from typing import Any

from mirage_ds.config import Config
from mirage_ds.data.plan import ORDER
from mirage_ds.errors import CheckpointError
from mirage_ds.zero3 import distributed

FACTS_NAME = "run.json"


def describe_run(
    config: Config, deepspeed_config: dict[str, Any], manifest_digest: str, max_steps: int
) -> dict[str, Any]:
    """The facts of this run that a checkpoint stores; compared on resume."""
    world_size = distributed.world_size()
    return {
        "world_size": world_size,
        "global_batch_size": config.train.samples_per_step(world_size),
        "max_steps": max_steps,
        "manifest_digest": manifest_digest,
        "order": ORDER,
        "deepspeed": deepspeed_config,
        "config": config.model_dump(mode="json"),
    }


def read_facts(file: Path) -> dict[str, Any]:
    """Reads run.json of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read ({file.parent}): {error}; expected the file that the run wrote; "
            "restore it, use another checkpoint, or set a new run.dir"
        ) from error
    return facts
