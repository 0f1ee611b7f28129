"""Rows per second and memory of `mirage-data build`, with 1 and more workers.

python benchmarks/build.py [--rows 400] [--pixels 504] [--workers 1 2] [--repeats 3] [--folder DIR] [--json FILE]

Each build is a start of the command, imports included; the numbers of workers take turns, and the medians are shown:

seconds     from the start to the end; on a machine with other work it says little
processor   seconds of all processes of the build, in user and system mode: other work hardly changes it. If the work is
            divided evenly, W workers on W idle cores take at least 1/W of it, which gives `at most`
at most     how many times as fast as 1 worker it can be, by processor time
memory      the largest of any one process
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from mirage_ds.wide_console import wide_console

COMMAND = [sys.executable, "-c", "from data_tools import cli; cli.main()", "build"]
PR_SET_CHILD_SUBREAPER = 36


def write_rows(folder: Path, count: int, pixels: int) -> Path:
    """Rows with an input and a helper image each: JPEG files of smooth noise, as large as photos of this size."""
    numbers = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            names = [f"{number}_{kind}.jpg" for kind in ("in", "out")]
            for name in names:
                noise = numbers.integers(0, 256, (pixels // 6, pixels // 6, 3), dtype=np.uint8)
                Image.fromarray(noise).resize((pixels, pixels)).save(folder / name, quality=90)
            row = {"text_input": "Where? <image>", "text_output": "<output_image>There.", "image_input": names[0]}
            file.write(json.dumps(row | {"image_output": names[1]}) + "\n")
    return folder / "rows.jsonl"


def measure(rows: Path, output: Path, workers: int) -> dict[str, float]:
    """One build: all its processes, as this one becomes the parent of those that outlive theirs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(
        [*COMMAND, "--input", str(rows), "--output", str(output), "--workers", str(workers)],
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - begin
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(output)
    return {
        "seconds": seconds,
        "processor_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory_mb": after.ru_maxrss / 1000,  # of all builds until now
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--pixels", type=int, default=504)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    found: dict[int, list[dict[str, float]]] = {workers: [] for workers in arguments.workers}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        rows = write_rows(Path(name), arguments.rows, arguments.pixels)
        for _ in range(arguments.repeats):
            for workers, runs in found.items():
                runs.append(measure(rows, Path(name) / "shards", workers))
            loads.append(os.getloadavg()[0])
    medians: dict[int, dict[str, Any]] = {
        workers: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for workers, runs in found.items()
    }
    first = next(iter(medians.values()))
    table = Table("workers", "seconds", "rows/s", "processor s", "at most", "memory MB")
    for workers, median in medians.items():
        median["at_most"] = workers * first["processor_s"] / median["processor_s"]
        rate = arguments.rows / median["seconds"]
        cells = [f"{median[key]:.2f}" for key in ("processor_s", "at_most")]
        table.add_row(str(workers), f"{median['seconds']:.2f}", f"{rate:.0f}", *cells, f"{median['memory_mb']:.0f}")
    wide_console().print(table)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {min(loads)} to {max(loads)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"medians": medians, "loads": loads}, indent=1) + "\n")


if __name__ == "__main__":
    main()
