"""Time of a checkpoint: how long training waits, and until it is complete; in the background and blocking.

python benchmarks/checkpoint.py [--gb 0.5 2] [--ranks 2] [--folder DIR] [--json FILE]

A real ZeRO-3 engine with AdamW; the model is a stack of square layers whose width gives the size. Both modes are
measured in the same processes, in turns, and the medians are shown:

pause       seconds that training waits: all of a blocking save; in the background the copy into host memory, and the
            end, when rank 0 gives the checkpoint its name
total       seconds until the checkpoint is complete
step        seconds of a training step: while nothing is written, and while a checkpoint is written

On GPUs it uses one per rank, on other machines the CPU. The folder must be on the disk that is to be measured.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds import library_noise
from mirage_ds.checkpoint.save import ADAM_BYTES, Progress, Saves, own_bytes
from mirage_ds.checkpoint.writer import Writer, with_memory
from mirage_ds.config import Config
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed

LAYERS, ROWS = 8, 8
TIMEOUT_S = 1800
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": ROWS,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class Bench:
    """One rank: an engine, and its saves in both modes."""

    def __init__(self, size: float, folder: Path, writer: Writer) -> None:
        self.device = distributed.init(TIMEOUT_S)
        self.width = math.isqrt(int(size / ADAM_BYTES / LAYERS))
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED):
            model = torch.nn.Sequential(*(torch.nn.Linear(self.width, self.width, bias=False) for _ in range(LAYERS)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=self.device.type == "cuda")
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
        with_writer = with_memory(writer, own_bytes(self.engine.module))
        if with_writer is None:
            raise SystemExit("not measured: the mode `background` needs more host memory")
        self.saves = {
            mode: Saves(self.engine, configuration(folder / mode), {}, writer=own)
            for mode, own in {"background": with_writer, "blocking": None}.items()
        }
        self.number = 0

    def step(self) -> float:
        """Seconds of a training step."""
        started_s = time.monotonic()
        self.engine.backward(self.engine(torch.randn(ROWS, self.width, device=self.device)).square().mean())
        self.engine.step()
        get_accelerator().synchronize()
        return time.monotonic() - started_s

    def save(self, mode: str) -> dict[str, Any]:
        """The times of one checkpoint, and of the steps before it and while it is written."""
        saves = self.saves[mode]
        alone = [self.step() for _ in range(2)]
        self.number += 1
        distributed.barrier()
        started_s = time.monotonic()
        saves.save(TrainState(self.number, self.number), wait=False)
        pause_s, during = time.monotonic() - started_s, []
        while distributed.max_over_ranks([saves.progress()], self.device) == [Progress.WRITING]:
            during.append(self.step())
        ended_s = time.monotonic()
        saves.finish()
        pause_s += time.monotonic() - ended_s
        return {"pause_s": pause_s, "total_s": time.monotonic() - started_s, "alone_s": alone, "during_s": during}


def configuration(run: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(run)},
            "model": {"path": "unused"},
            "data": {"shards": "unused"},
            "train": {"stage": "text", "max_steps": 10**6},
            "checkpoint": {"keep_latest_k": 1},
        }
    )


def run_rank(rank: int, ranks: int, port: int, size: float, repeats: int, folder: Path) -> None:
    """What each process does; rank 0 leaves its times in FOLDER/times.json."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    library_noise.silence()
    bench = Bench(size, folder, Writer())
    modes = list(bench.saves)
    for mode in modes:  # not counted: the first one of a process
        bench.save(mode)
    times = {mode: [] for mode in modes}
    for _ in range(repeats):
        for mode in modes:
            times[mode].append(bench.save(mode))
    if distributed.is_main():
        (folder / "times.json").write_text(json.dumps({"device": str(bench.device), "times": times}))
    distributed.shut_down()


def measure(size: float, ranks: int, repeats: int, parent: Path) -> dict[str, Any]:
    """The times of all saves of one size."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="checkpoint-benchmark-") as name, socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        context = multiprocessing.get_context("spawn")
        arguments = (ranks, probe.getsockname()[1], size, repeats, Path(name))
        processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed: see above")
        return json.loads((Path(name) / "times.json").read_text())


def row(size: float, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """The medians of one size."""

    def median(mode: str, kind: str) -> float:
        values = [each[kind] for each in found["times"][mode]]
        flat = [second for value in values for second in (value if isinstance(value, list) else [value])]
        return statistics.median(flat) if flat else math.nan

    background, blocking = (
        {kind: median(mode, kind) for kind in ("pause_s", "total_s", "alone_s", "during_s")}
        for mode in ("background", "blocking")
    )
    return {
        "gb": size / 1e9,
        "ranks": ranks,
        "device": found["device"],
        "background_pause_s": background["pause_s"],
        "background_total_s": background["total_s"],
        "blocking_pause_s": blocking["pause_s"],
        "pause_share": background["pause_s"] / blocking["pause_s"],
        "step_s": background["alone_s"],
        "step_while_writing_s": background["during_s"],
        "all": found["times"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.5, 2.0], help="sizes of the checkpoint of all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all times there")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    machine = {
        "machine": f"{platform.machine()}, {card}",
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "load": os.getloadavg()[0],
        "free_gb": shutil.disk_usage(arguments.folder).free / 1e9,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows = [
        row(gb * 1e9, arguments.ranks, measure(gb * 1e9, arguments.ranks, arguments.repeats, arguments.folder))
        for gb in arguments.gb
    ]
    print("| GB | ranks | pause s | total s | pause, blocking s | of blocking | step s | step while writing s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for each in rows:
        print(
            f"| {each['gb']:g} | {each['ranks']} | {each['background_pause_s']:.2f} | "
            f"{each['background_total_s']:.2f} | {each['blocking_pause_s']:.2f} | {each['pause_share']:.0%} | "
            f"{each['step_s']:.2f} | {each['step_while_writing_s']:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(machine | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
