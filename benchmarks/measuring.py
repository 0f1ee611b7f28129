"""Measures one training step: wall time, CPU time, peak memory, synchronisations; and the rate of matrix products."""

import gc
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mirage_ds.versions import versions

Step = Callable[[], object]
REPEATS = 10  # of each matrix product


@dataclass(frozen=True)
class Measured:
    """One step."""

    seconds: float
    cpu_s: float  # of all threads: far below seconds x threads, other programs had the cores
    peak_bytes: int  # on a GPU: allocated by torch; on a CPU: the process's resident memory


def measure(step: Step, device: torch.device) -> Measured:
    gc.collect()
    start_peak(device)
    synchronize(device)
    started, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return Measured(time.perf_counter() - started, time.process_time() - cpu, peak_bytes(device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> None:
    """Forgets the peak so far; on a CPU as Linux allows it (man proc, clear_refs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def present_bytes(device: torch.device) -> int:
    """What is in memory now, counted as in `peak_bytes`."""
    start_peak(device)
    return peak_bytes(device)


def host_syncs(step: Step, device: torch.device) -> int | None:
    """How often the host waits for the GPU in one step, as torch warns of it; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def product_rates(shapes: list[tuple[int, int, int]], device: torch.device) -> dict[str, float]:
    """FLOP/s of float32 products [m, k] x [k, n], each the median of some repeats."""
    rates = {}
    for m, k, n in shapes:
        left, right = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        torch.mm(left, right)
        seconds = []
        for _ in range(REPEATS):
            synchronize(device)
            started = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        rates[f"[{m}, {k}] x [{k}, {n}]"] = 2 * m * k * n / median(seconds)
    return rates


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
