"""Two ranks train every stage for a few steps under ZeRO-3 over gloo; stage 2 starts from stage 1's checkpoint.

    python tests/versions/smoke.py INPUTS FOLDER [--write]

Trains INPUTS/model on INPUTS/shards; with --write it makes both first. FOLDER/losses.json gets the losses of each
stage's steps. All ranks are forks of this process, so that a cell of the matrix imports torch and DeepSpeed once.
"""

import json
import multiprocessing
import os
import shutil
import sys
from multiprocessing.connection import wait
from pathlib import Path

import launching
from generated_rows import write_rows

import mirage_ds.train
from data_tools.build import build
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
RANKS, STEPS = 2, 4
START = {"text": [], "stage1": [], "stage2": ["run.init_from={folder}/stage1"]}


def write_inputs(inputs: Path) -> None:
    shutil.rmtree(inputs, ignore_errors=True)
    rows = write_rows(inputs / "rows", 10)
    write_tiny(rows, inputs / "model", seed=0)
    build(rows, inputs / "shards", maxcount=4, maxsize=10**9)


def train(stage: str, inputs: Path, folder: Path, place: dict[str, str]) -> None:
    """What one rank does."""
    os.environ.update(place)
    overrides = [f"run.dir={folder / stage}", *(text.format(folder=folder) for text in START[stage])]
    overrides += [f"model.path={inputs / 'model'}", f"data.shards={inputs / 'shards'}", "data.num_workers=0"]
    overrides += [f"train.stage={stage}", f"train.max_steps={STEPS}", "train.warmup_steps=1"]
    mirage_ds.train.run(load_config(ROOT / "launch" / "recipes" / "tiny-stage1.yaml", overrides))


def run_ranks(stage: str, inputs: Path, folder: Path) -> None:
    """Trains a stage; when one rank fails, so does this process."""
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port())}
    places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    ranks = [FORK.Process(target=train, args=(stage, inputs, folder, place)) for place in places]
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.exitcode is None]:
        wait([rank.sentinel for rank in running])
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
    if any(rank.exitcode for rank in ranks):
        sys.exit(1)  # the rank has printed why


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    inputs, folder = (Path(argument) for argument in sys.argv[1:3])
    if sys.argv[3:] == ["--write"]:
        write_inputs(inputs)
    for stage in START:
        run_ranks(stage, inputs, folder)
    (folder / "losses.json").write_text(json.dumps({stage: losses(folder / stage) for stage in START}))
