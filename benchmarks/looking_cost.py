"""What it costs to look at a run: its latent health, its curves, and the pictures of an evaluation.

    python -m benchmarks.looking_cost launch/recipes/demo-stage1.yaml evaluation.task=vsp-spatial-planning ...

Trains the run of a recipe in this process, as one rank, and reads the process's clock before and after each call that
only looks. The clock counts processor time, so that other work on the machine changes little; one thread is best. The
costs are shares of the processor time of all steps, without the decoding of the evaluations.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measuring import cpu_name
from mirage_ds import train
from mirage_ds.evaluation.training import evaluations
from mirage_ds.recipe import load_config
from mirage_ds.training.curves import Curves
from mirage_ds.training.latent_sums import LatentSums
from mirage_ds.training.trainer import Trainer
from mirage_ds.versions import versions

STEPS = "steps"
WATCHED: dict[str, list[tuple[Any, str]]] = {
    STEPS: [(Trainer, "train_step")],
    "latent health": [(LatentSums, "add"), (LatentSums, "take")],
    "curves": [(Curves, "add")],
    "pictures": [(evaluations, "looks"), (Curves, "add_looks")],
}


@dataclass
class Spent:
    """On the calls of one kind."""

    calls: int = 0
    seconds: float = 0.0


@contextmanager
def watched(owner: Any, name: str, spent: Spent) -> Iterator[None]:
    """Counts calls of a function, and their processor time."""
    function = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        began_s = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent.calls += 1
            spent.seconds += time.process_time() - began_s

    with patch.object(owner, name, timed):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    spent = {kind: Spent() for kind in WATCHED}
    with ExitStack() as stack:
        for kind, functions in WATCHED.items():
            for owner, name in functions:
                stack.enter_context(watched(owner, name, spent[kind]))
        train.run(load_config(arguments.recipe, arguments.overrides))
    print(json.dumps({"machine": cpu_name(), "versions": versions()}))
    print("| what | calls | ms of a call | of all steps |\n| --- | ---: | ---: | ---: |")
    for kind, each in spent.items():
        share = each.seconds / spent[STEPS].seconds
        print(f"| {kind} | {each.calls} | {1000 * each.seconds / max(each.calls, 1):.2f} | {share:.2%} |")


if __name__ == "__main__":
    main()
