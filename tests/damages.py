"""What the ranks of test_damages.py do: they save and load checkpoints of a small ZeRO-3 model.

Each rank records the sha256 of its float32 masters before it saves a step; after a load it reports tag and sha256.
"""

import hashlib
import json
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mirage_ds.checkpoint.find import find_undamaged
from mirage_ds.checkpoint.load import resume
from mirage_ds.checkpoint.save import Saves
from mirage_ds.checkpoint.writer import Writer
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def make_engine() -> Any:
    distributed.init(60)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED):
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)[0]


def configuration(run: Path, keep: int) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(run)},
            "model": {"path": "unused"},
            "data": {"shards": "unused"},
            "train": {"stage": "text", "max_steps": 10**6},
            "checkpoint": {"keep_latest_k": keep},
        }
    )


def digest(engine: Any) -> str:
    return digest_of(engine.optimizer.fp32_partitioned_groups_flat)


def digest_of(groups: list[torch.Tensor]) -> str:
    """sha256 of a rank's float32 masters."""
    return hashlib.sha256(b"".join(group.detach().numpy().tobytes() for group in groups)).hexdigest()


def load(engine: Any, run: Path) -> dict[str, str]:
    """The loaded tag and the sha256 of the masters, or the error."""
    try:
        found = find_undamaged(run)
        if found is None:
            return {}
        step = resume(engine, found).step
    except CheckpointError as error:
        return {"error": str(error)}
    assert found.name == f"global_step{step}"
    return {"tag": found.name, "sha256": digest(engine)}


def save_steps(run: Path, notes: Path, steps: int, keep: int) -> None:
    """Resumes from the newest undamaged checkpoint, and saves each step; notes/loaded_RANK has what was loaded."""
    writer = Writer()
    engine = make_engine()
    saves = Saves(engine, configuration(run, keep), {"world_size": 2, "config": {}}, writer=writer)
    rank, found = distributed.rank(), load(engine, run)
    with (notes / f"loaded_{rank}").open("a") as file:
        file.write(json.dumps(found) + "\n")
    first = int(found["tag"].removeprefix("global_step")) + 1 if "tag" in found else 1
    for step in range(first, first + steps):
        engine.backward(engine(torch.randn(1, 300) + step).square().sum())
        engine.step()
        note = notes / f"global_step{step}_{rank}.new"
        note.write_text(digest(engine))
        note.replace(note.with_suffix(""))
        (notes / f"saving_{rank}").write_text(str(step))
        state = TrainState(step=step, position=step)
        saves.save(state, wait=False)
    saves.finish()


def load_all(runs: list[Path], results: Path) -> None:
    """results/results_RANK has what was loaded of each run."""
    engine = make_engine()
    found = [load(engine, run) for run in runs]
    (results / f"results_{distributed.rank()}").write_text(json.dumps(found))


def no_room(run: Path, results: Path) -> None:
    """Only rank 1 cannot write: the system limits its files to 100 kB. results/no_room_RANK has the message."""
    engine = make_engine()
    rank = distributed.rank()
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        Saves(engine, configuration(run, 2), {"world_size": 2}).save(TrainState(step=9, position=9), wait=True)
    except CheckpointError as error:
        (results / f"no_room_{rank}").write_text(str(error))


def damage(run: Path, rng: random.Random) -> str:
    """Applies one to three random damages to a run's checkpoints; returns a description."""
    done = []
    for _ in range(rng.randint(1, 3)):
        file = rng.choice(sorted(run.glob("checkpoints/global_step*/*")))
        kind = rng.choice(["truncate", "flip", "remove"])
        if kind == "truncate":
            os.truncate(file, rng.randrange(file.stat().st_size))
        elif kind == "flip" and file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()
        done.append(f"{kind} {file.relative_to(run / 'checkpoints')}")
    return ", ".join(done)
