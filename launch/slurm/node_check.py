"""Checks on each node of a job, before the ranks start, that the run can read its inputs there. Imports no torch.

python -m launch.slurm.node_check RUN/jobs/N
"""

import os
import socket
import sys
from pathlib import Path

from mirage_ds.config import Config
from mirage_ds.data.shards import load_manifest
from mirage_ds.errors import ConfigError, DataError, MirageError
from mirage_ds.recipe import load_config


def check_inputs(config: Config) -> None:
    """Checks that this machine sees the inputs of the run.

    Raises:
        MirageError: shards, the model folder or the run to start from are missing here.
    """
    for folder in (config.data.shards, config.evaluation.shards):
        if folder is not None:
            load_manifest(folder)
    # A hub id is not a path, and a hub model may be in any cache.
    if config.model.path.startswith(("/", ".", "~")) and not Path(config.model.path).is_dir():
        raise ConfigError(
            f"the model folder does not exist (model.path={config.model.path}); allowed: a folder that every node "
            "sees, or a hub id; set model.path"
        )
    if config.run.init_from is not None and not config.run.init_from.is_dir():
        raise DataError(
            f"the run to start from does not exist (run.init_from={config.run.init_from}); allowed: the folder of a "
            "run with a checkpoint; set run.init_from"
        )


def main() -> None:
    try:
        check_inputs(load_config(Path(sys.argv[1]) / "recipe.yaml"))
    except MirageError as error:
        print(f"error: node {os.environ.get('SLURMD_NODENAME', socket.gethostname())}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
