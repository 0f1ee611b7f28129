"""All checks of one node, in the order of the table; every check yields rows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.doctor import machine_checks as machine
from launch.doctor import op_checks, recipe_checks
from launch.doctor.findings import Row, failure
from mirage_ds.config import Config
from mirage_ds.data.folders import load_folders
from mirage_ds.data.shards import read_manifest
from mirage_ds.errors import DataError
from mirage_ds.versions import versions


def check_node(config: Config | None, deepspeed_config: dict[str, Any]) -> Iterator[Row]:
    """All checks of this node; without a recipe, only those that need none.

    A check catches only the errors that it expects; any other exception is a bug and keeps its traceback.
    """
    yield machine.check_packages()
    yield machine.check_computation()
    yield machine.check_gpus()
    yield from op_checks.check_locks()
    if config is not None:
        yield from op_checks.check_ops(deepspeed_config)
        yield recipe_checks.check_attention(config)
        yield recipe_checks.check_kernels()
        yield recipe_checks.check_model(config)
        yield from recipe_checks.check_shards(config)
        yield recipe_checks.check_samples(config)
        yield from recipe_checks.check_evaluation(config)
        yield machine.check_folder("run.dir", config.run.dir)
    yield machine.check_folder("TMPDIR", Path(os.environ.get("TMPDIR", "/tmp")))
    yield machine.check_socket_path()
    yield machine.check_shared_memory(config.data if config else None)
    yield machine.check_open_files()
    yield machine.check_orphans()
    yield machine.check_slurm()
    yield machine.check_munge()


def facts(config: Config | None) -> dict[str, str]:
    """What must be the same on every node."""
    found = versions()
    if config is not None:
        try:
            found["data.shards"] = load_folders(config.data, read_manifest).digest
        except DataError as error:
            found["data.shards"] = failure("data.shards", error).found
    return found
