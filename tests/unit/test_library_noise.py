"""What libraries print: DeepSpeed's note on a machine without a GPU goes, everything else stays."""

import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest

from mirage_ds import library_noise

NOTE = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


@pytest.fixture
def deepspeed_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """DeepSpeed's own, for this test without the filters of others."""
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", [])
    with warnings.catch_warnings():
        yield logger


def passes(logger: logging.Logger, message: str) -> bool:
    return bool(logger.filter(logger.makeRecord("DeepSpeed", logging.WARNING, "file", 1, message, (), None)))


@pytest.mark.parametrize("device", [None, *library_noise.GPU_DEVICES])
def test_the_note_stays_where_a_gpu_is(tmp_path: Path, deepspeed_logger: logging.Logger, device: str | None) -> None:
    if device:
        (tmp_path / device).touch()
    library_noise.silence(tmp_path)
    assert passes(deepspeed_logger, NOTE) == (device is not None)
    assert passes(deepspeed_logger, "NCCL backend is slow")


def test_deepspeed_is_imported_silently() -> None:
    """The real DeepSpeed, left to find out by itself that there is no GPU."""
    environment = launching.environment()
    del environment["DS_ACCELERATOR"]
    script = (
        "from mirage_ds import library_noise; library_noise.silence()\n"
        "import deepspeed; from deepspeed.accelerator import get_accelerator; get_accelerator()"
    )
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


class Failing(threading.Thread):
    """As TensorBoard's thread, by the module that it says it is of."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def run(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("module", "error", "shown"),
    [
        (library_noise.CURVES_WRITER, OSError("full"), 0),  # test_full_disk.py has a real one
        (library_noise.CURVES_WRITER, ValueError("a fault"), 1),
        (__name__, OSError("full"), 1),
    ],
)
def test_the_tracebacks_of_other_threads_stay(
    monkeypatch: pytest.MonkeyPatch, deepspeed_logger: logging.Logger, module: str, error: Exception, shown: int
) -> None:
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    library_noise.silence()
    monkeypatch.setattr(Failing, "__module__", module)
    thread = Failing(error)
    thread.start()
    thread.join()
    assert len(seen) == shown
