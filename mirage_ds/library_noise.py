"""Silences what libraries print and no user can act on. Everything else that they print is shown. Needs no torch."""

import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Names in /dev: the drivers of NVIDIA and AMD, and WSL's GPU.
GPU_DEVICES = ("nvidiactl", "kfd", "dxg")
CURVES_WRITER = "tensorboard.summary.writer.event_file_writer"


def silence(devices: Path = Path("/dev")) -> None:
    """Call it before DeepSpeed is imported, which is when DeepSpeed warns that it found no GPU.

    On a machine with a GPU's driver that warning is worth reading, and stays.
    """
    if not any((devices / name).exists() for name in GPU_DEVICES):
        logging.getLogger("DeepSpeed").addFilter(_is_not_the_cpu_note)
    # DeepSpeed calls torch's collectives by their old names, on every rank and in every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    threading.excepthook = partial(_show_failed_thread, threading.excepthook)


def _is_not_the_cpu_note(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU.")


def _show_failed_thread(show: Callable[[threading.ExceptHookArgs], object], failed: threading.ExceptHookArgs) -> None:
    """The traceback of a thread, unless the system did not let TensorBoard's thread write: the next point says so."""
    if type(failed.thread).__module__ != CURVES_WRITER or not issubclass(failed.exc_type, OSError):
        show(failed)
