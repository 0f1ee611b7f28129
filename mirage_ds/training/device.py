"""What DeepSpeed's accelerator says of this rank's device: its time, its peak memory, which GPU it is.

A CPU has none of it: its time is the host's, and the memory that DeepSpeed reports for it is that of the process, which
no plan describes.
"""

import time
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.sizing.gpus import Gpu, gpu_of_device


class Event(Protocol):
    """A moment of the device's work, as torch.cuda.Event: it may lie ahead of the host, which does not wait for it."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds; both moments have come."""


class HostEvent:
    """The same where the host computes: a moment comes when it is recorded."""

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: "HostEvent") -> float:
        return 1000 * (end_event.at_s - self.at_s)


def is_gpu() -> bool:
    return bool(get_accelerator().device_name() == "cuda")


def record_event() -> Event:
    """This moment, in the order of the device's work."""
    event: Event = get_accelerator().Event(enable_timing=True) if is_gpu() else HostEvent()
    event.record()
    return event


def peak_bytes() -> tuple[int, int]:
    """The most that torch has allocated, and has reserved, since this process began; (0, 0) on a CPU."""
    accelerator = get_accelerator()
    return (accelerator.max_memory_allocated(), accelerator.max_memory_reserved()) if is_gpu() else (0, 0)


def find_gpu() -> Gpu | None:
    """The specifications of this rank's GPU; None on a CPU and on a GPU that the table does not have."""
    return gpu_of_device(torch.cuda.get_device_name()) if is_gpu() else None
