"""Pairs of ranks that save and load checkpoints of a small ZeRO-3 model; each pair is forked, without new imports.

python damages.py FOLDER SEED SAVE_KILLS DAMAGES      prints the damages as JSON on the last line

Each rank records the sha256 of its float32 masters before it saves a step; after a load it reports tag and sha256.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import launching
import torch

from mirage_ds.checkpoint.find import find_undamaged
from mirage_ds.checkpoint.load import resume
from mirage_ds.checkpoint.save import save
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def fork_pair(rank_main: Callable[[int], None], log: Path) -> list[int]:
    """Starts two ranks; their process ids."""
    port, children = str(launching.free_port()), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            try:
                rank_main(rank)
            finally:
                sys.stdout.flush()
                sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
                os._exit(1 if sys.exc_info()[0] else 0)
        children.append(child)
    return children


def wait(children: list[int]) -> None:
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
    groups = engine.optimizer.fp32_partitioned_groups_flat
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


def save_steps(run: Path, notes: Path, steps: int, keep: int, load_first: bool = True) -> Callable[[int], None]:
    """Resumes from the newest undamaged checkpoint, and saves each step; notes/loaded_RANK has what was loaded."""

    def rank_main(rank: int) -> None:
        engine = make_engine()
        found = load(engine, run) if load_first else {}
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
            save(engine, configuration(run, keep), state, {"world_size": 2, "config": {}})

    return rank_main


def kill_while_saving(folder: Path, rng: random.Random, kills: int) -> None:
    """SIGKILL to both ranks, one after the other, at random moments from the first save on."""
    notes, run = folder / "notes", folder / "killed"
    for _ in range(kills):
        (notes / "saving_0").unlink(missing_ok=True)
        children = fork_pair(save_steps(run, notes, 10**6, keep=2), folder / "log")
        while not (notes / "saving_0").exists():
            assert os.waitpid(children[0], os.WNOHANG)[0] == 0, (folder / "log").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        rng.shuffle(children)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


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


def load_all(runs: list[Path], results: Path) -> Callable[[int], None]:
    def rank_main(rank: int) -> None:
        engine = make_engine()
        (results / f"results_{rank}").write_text(json.dumps([load(engine, run) for run in runs]))

    return rank_main


def no_room(run: Path, results: Path) -> Callable[[int], None]:
    """Only rank 1 cannot write: the system limits its files to 100 kB."""

    def rank_main(rank: int) -> None:
        engine = make_engine()
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            save(engine, configuration(run, 2), TrainState(step=9, position=9), {"world_size": 2})
        except CheckpointError as error:
            (results / f"no_room_{rank}").write_text(str(error))

    return rank_main


def main() -> None:
    folder, seed, kills, damages = Path(sys.argv[1]), *map(int, sys.argv[2:])
    rng = random.Random(seed)
    notes, run, log = folder / "notes", folder / "run", folder / "log"
    notes.mkdir()
    kill_while_saving(folder, rng, kills)
    shutil.copytree(notes, folder / "notes_of_killed")
    wait(fork_pair(load_all([folder / "killed"], folder / "notes_of_killed"), log))
    wait(fork_pair(save_steps(run, notes, 3, keep=3), log))
    wait(fork_pair(no_room(run, folder), log))
    runs, done = [], []
    for number in range(damages):
        runs.append(folder / f"damaged_{number}")
        shutil.copytree(run, runs[-1])
        done.append(damage(runs[-1], rng))
    wait(fork_pair(load_all(runs, notes), log))
    print(json.dumps(done))


if __name__ == "__main__":
    main()
