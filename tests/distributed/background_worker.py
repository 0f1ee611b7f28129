"""What the ranks of test_background_saves.py do with an engine: saves whose writers are held by SIGSTOP, or killed."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import damages
import torch

from mirage_ds.checkpoint import host_memory
from mirage_ds.checkpoint.save import Progress, Saves, own_bytes
from mirage_ds.checkpoint.writer import Writer, with_memory
from mirage_ds.errors import CheckpointError
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed

FACTS = {"world_size": 2, "config": {}}


def train_step(engine: Any) -> str:
    """One step; the sha256 of this rank's masters after it."""
    engine.backward(engine(torch.randn(1, 300)).square().sum())
    engine.step()
    return damages.digest(engine)


def main(run: Path, notes: Path) -> None:
    """Reports what happened to notes/RANK.json."""
    own = Writer()
    engine = damages.make_engine()
    rank, device = distributed.rank(), engine.device
    assert with_memory(own, own_bytes(engine.module)) is own
    saves = Saves(engine, damages.configuration(run, 3), FACTS, writer=own)
    checkpoints = run / "checkpoints"

    def agreed() -> Progress:
        return Progress(distributed.max_over_ranks([saves.progress()], device)[0])

    report: dict[str, Any] = {"masters": {1: train_step(engine)}}
    os.kill(own.pid, signal.SIGSTOP)
    saves.save(TrainState(1, 1), wait=False)
    report["while held"] = [agreed().name, (checkpoints / "global_step1").exists()]
    report["masters"] |= {step: train_step(engine) for step in (2, 3)}
    threading.Timer(0.5, os.kill, (own.pid, signal.SIGCONT)).start()
    saves.save(TrainState(3, 3), wait=False)
    report["first when the second begins"] = (checkpoints / "global_step1").exists()
    train_step(engine)
    while agreed() == Progress.WRITING:
        pass
    saves.finish()
    report["masters"][4] = train_step(engine)
    saves.save(TrainState(4, 4), wait=True)
    report["loaded"] = damages.load(engine, run)

    if rank == 1:
        os.kill(own.pid, signal.SIGKILL)
    saves.save(TrainState(5, 5), wait=False)
    while agreed() == Progress.WRITING:
        pass
    report["after the kill"] = agreed().name
    try:
        saves.finish()
    except CheckpointError as error:
        report["error"] = str(error)
    (notes / f"{rank}.json").write_text(json.dumps(report))


def little_memory(run: Path) -> None:
    """Rank 1 alone finds that its machine lacks memory; then, with another writer, the system refuses it the memory."""
    writers = [Writer(), Writer()]
    engine = damages.make_engine()
    size = own_bytes(engine.module)
    if distributed.rank() == 1:
        host_memory.available_bytes = lambda: 10**5
    assert with_memory(writers[0], size) is None
    host_memory.available_bytes = lambda: 10**12
    if distributed.rank() == 1:
        writers[1].copy.reserve = lambda size: os.unlink("/nowhere/none")
    assert with_memory(writers[1], size) is None
    train_step(engine)
    Saves(engine, damages.configuration(run, 3), FACTS).save(TrainState(1, 1), wait=False)
    assert (run / "checkpoints" / "global_step1").exists()
