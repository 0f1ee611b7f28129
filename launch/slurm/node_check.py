"""Checks on each node of a job, before the ranks start, that the run can read its inputs there. Imports no torch.

python -m launch.slurm.node_check RUN/jobs/N
"""

import os
import socket
import sys
from pathlib import Path

from mirage_ds.early_checks import check_inputs
from mirage_ds.errors import MirageError
from mirage_ds.recipe import load_config


def main() -> None:
    try:
        check_inputs(load_config(Path(sys.argv[1]) / "recipe.yaml"))
    except MirageError as error:
        print(f"error: node {os.environ.get('SLURMD_NODENAME', socket.gethostname())}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
