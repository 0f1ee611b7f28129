"""One rank of test_evaluated_runs.py: whole runs, one after the other, in one process group."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mirage_ds.recipe import load_config
from mirage_ds.train import train
from mirage_ds.zero3 import distributed

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"


def main(runs: Sequence[Sequence[str]]) -> None:
    """Trains each run, given as overrides of the recipe."""
    distributed.shut_down = lambda: None  # the next run joins the same group
    for overrides in runs:
        train(load_config(RECIPE, list(overrides)))
    torch.distributed.destroy_process_group()
