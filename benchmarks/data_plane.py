"""Time and memory of opening a large folder of shards and of finding what a step computes, for any number of samples.

python benchmarks/data_plane.py make --output FOLDER [--samples 10000000] [--shards 10000] [--format 1]
python benchmarks/data_plane.py open FOLDER [--processes 8]
python benchmarks/data_plane.py start FOLDER --model MODEL

make    writes manifest and index of made-up samples, equal to a build's, beside empty (sparse) files of the tars' sizes
open    in fresh processes, all at a time: reads the manifest, maps the index, makes the order, and then, for global
        batches at random positions, finds their samples, what they cost and how they are dealt; prints the slowest
start   `prepare` of training/start.py, in a process of its own: all checks of a run's start but the model's. Another
        checkout's with PYTHONPATH=CHECKOUT, where this file stays the one that is run

Memory is read from /proc/PID/smaps_rollup every 10 ms: a process's anonymous memory, which is its own, above what it
had after its imports; and its proportional set size (PSS), in which shared pages count once for all processes together.
Before the first process opens the folder, the index is dropped from the page cache.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

GLOBAL_BATCH, WORLD_SIZE, NUM_BATCHES = 1024, 64, 20
KEY_DIGITS = 9
MB = 2**20


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process, by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


class Peak:
    """The highest anonymous memory and PSS of some processes together, while something runs."""

    def __init__(self, *pids: int | str) -> None:
        self.pids = pids

    def __enter__(self) -> "Peak":
        self.anonymous, self.pss, self.over = 0, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self._look()

    def _look(self) -> None:
        now = [memory(pid) for pid in self.pids]
        self.anonymous = max(self.anonymous, sum(each["Anonymous"] for each in now))
        self.pss = max(self.pss, sum(each["Pss"] for each in now))

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def made_up(num_samples: int, num_shards: int, ends: list[int]) -> Iterator[Any]:
    """The columns of each shard: samples with one image and one helper image of random sizes.

    `ends` gets the size of each shard.
    """
    from mirage_ds.data.columns import NOT_GIVEN, SAMPLE, Index

    draw = np.random.default_rng(0)
    for shard, numbers in enumerate(np.array_split(np.arange(num_samples), num_shards)):
        facts = draw.integers([224, 224, 224, 224, 50, 100], [1400, 1400, 1000, 1000, 900, 4000], (len(numbers), 6))
        samples = np.zeros(len(numbers), SAMPLE)
        samples["size"] = 512 * (4 + (facts[:, 0] * facts[:, 1] + facts[:, 2] * facts[:, 3]) // 2000)
        samples["offset"] = np.cumsum(samples["size"]) - samples["size"]
        samples["shard"], samples["key_bytes"], samples["first_latent_size"] = shard, KEY_DIGITS, NOT_GIVEN
        samples["first_key_byte"] = KEY_DIGITS * np.arange(len(numbers))
        samples["first_image"] = 2 * np.arange(len(numbers))
        samples["question_chars"], samples["answer_chars"] = facts[:, 4], facts[:, 5]
        for name in ("input_images", "helper_images", "image_blocks", "latent_blocks"):
            samples[name] = 1
        digits = numbers[:, None] // 10 ** np.arange(KEY_DIGITS)[::-1] % 10
        keys = (ord("0") + digits).astype(np.uint8).reshape(-1)
        ends.append(int(samples["size"].sum()))
        yield Index(samples, facts[:, :4].reshape(-1, 2).astype(np.int32), np.zeros(0, np.int32), keys)


def make(output: Path, num_samples: int, num_shards: int, version: int) -> None:
    from data_tools.manifest import sha256, write_index
    from mirage_ds.data.shards import FORMAT_VERSION

    output.mkdir(parents=True)
    ends: list[int] = []
    parts = made_up(num_samples, num_shards, ends)
    manifest: dict[str, Any] = {"format_version": version, "num_samples": num_samples}
    started, cpu = time.perf_counter(), time.process_time()
    if version == FORMAT_VERSION:
        manifest["index"] = [asdict(file) for file in write_index(output, parts)]
    else:
        with (output / "index.jsonl").open("w") as file:
            file.writelines(json.dumps(asdict(entry)) + "\n" for part in parts for entry in part.entries())
        manifest["index_sha256"] = sha256(output / "index.jsonl")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    counts = [len(part) for part in np.array_split(np.arange(num_samples), num_shards)]
    manifest["shards"] = []
    for number, (samples, size) in enumerate(zip(counts, ends, strict=True)):
        name = f"shard-{number:06d}.tar"
        with (output / name).open("wb") as file:
            file.truncate(size)
        manifest["shards"].append({"name": name, "samples": samples, "bytes": size, "sha256": ""})
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{num_samples} entries in {seconds:.1f} s, processor {cpu:.1f} s")


def opened(folder: Path) -> dict[str, float]:
    """Seconds and bytes of this process."""
    from mirage_ds.data.costs import SampleCosts
    from mirage_ds.data.index import load_index
    from mirage_ds.data.plan import Plan
    from mirage_ds.data.shards import load_manifest
    from mirage_ds.data.steps import Share, Steps
    from mirage_ds.patch_grid import smart_grids

    def image_tokens(sizes: Any) -> Any:
        return smart_grids(np.asarray(sizes, np.int64), 28, 3136, 12_845_056).prod(axis=1)

    before = memory()
    with Peak("self") as peak:
        started, cpu = time.perf_counter(), time.process_time()
        shards = load_manifest(folder)
        manifest_s = time.perf_counter() - started
        costs = SampleCosts(load_index(shards), image_tokens, "stage1", 4)
        share = Share(0, WORLD_SIZE, 4, GLOBAL_BATCH // WORLD_SIZE // 4)
        steps = Steps(Plan(shards.num_samples, shards.digest, 0), costs, share)
        open_s = time.perf_counter() - started
        draw = random.Random(os.getpid())
        starts = [draw.randrange(3 * shards.num_samples) for _ in range(NUM_BATCHES)]
        seconds = [timed(lambda start=start: steps.at(start))[1] for start in starts]
    return {
        "manifest_s": manifest_s,
        "open_s": open_s,
        "first_s": seconds[0],
        "worst_s": max(seconds),
        "cpu_s": time.process_time() - cpu,  # of all this: less than the seconds where other programs have the cores
        "anonymous": peak.anonymous - before["Anonymous"],
        "pss": peak.pss - before["Pss"],
    }


def open_all(folder: Path, processes: int) -> None:
    for path in [*(folder / "index").glob("*.npy")]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "opened", str(folder)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    with Peak(*(process.pid for process in running)) as peak:
        found = [json.loads(process.stdout.readline()) for process in running]  # type: ignore[union-attr]
    for process in running:
        process.communicate("over")
    worst = {name: max(each[name] for each in found) for name in found[0]}
    print(f"{processes} at a time, the slowest and largest; memory above the imports")
    for name, value in worst.items():
        print(f"  {name:12} {value:.3f}" if name.endswith("_s") else f"  {name:12} {value / MB:.0f} MB")
    print(f"  PSS of all, with imports {peak.pss / MB:.0f} MB")


def start(folder: Path, model: Path) -> None:
    from mirage_ds.config import Config
    from mirage_ds.training import run_data
    from mirage_ds.training.start import prepare

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    config = Config.model_validate(
        {
            "run": {"dir": str(folder.parent / "run"), "resume": "never"},
            "model": {"path": str(model), "latent_size": 4},
            "data": {"shards": str(folder)},
            "train": {"stage": "stage1", "max_steps": 10, "warmup_steps": 0, "micro_batch_size_per_gpu": 4},
        }
    )
    before, cpu = memory(), time.process_time()
    with Peak("self") as peak:
        prepared, seconds = timed(lambda: prepare(config))
        steps = run_data.deal_steps(config, prepared, 0)
        _, first_s = timed(lambda: steps.at(0))
    above = peak.anonymous - before["Anonymous"]
    print(f"prepare {seconds:.2f} s, first step {first_s:.3f} s, processor {time.process_time() - cpu:.2f} s")
    print(f"anonymous {above / MB:.0f} MB above the imports, PSS in all {peak.pss / MB:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--output", type=Path, required=True)
    making.add_argument("--samples", type=int, default=10_000_000)
    making.add_argument("--shards", type=int, default=10_000)
    making.add_argument("--format", type=int, default=2, choices=(1, 2))
    opening = commands.add_parser("open")
    opening.add_argument("folder", type=Path)
    opening.add_argument("--processes", type=int, default=1)
    commands.add_parser("opened").add_argument("folder", type=Path)  # one of the processes of `open`
    starting = commands.add_parser("start")
    starting.add_argument("folder", type=Path)
    starting.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "make":
        make(options.output, options.samples, options.shards, options.format)
    elif options.command == "open":
        print(f"Python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores")
        open_all(options.folder, options.processes)
    elif options.command == "opened":
        print(json.dumps(opened(options.folder)), flush=True)
        sys.stdin.read()
    else:
        start(options.folder, options.model)


if __name__ == "__main__":
    main()
