"""Starts ranks without a launcher: each is a fork of one process that has imported everything once.

A rank that is started from scratch spends most of a short test on its imports. So only tests of launchers use one;
the others call `start` with a function, by default the trainer's own main.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from unittest import mock

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
GRACE_S = 20  # between SIGTERM to the ranks that are left, after one has failed, and SIGKILL

held_ports: list[socket.socket] = []
forks = multiprocessing.get_context("forkserver")
# What a rank imports on its way, some of it late: DeepSpeed imports torch's compiler when it makes an optimizer.
forks.set_forkserver_preload(
    [
        "pytest",
        "mirage_ds.train",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    ]
)


def free_port() -> int:
    """A port that stays reserved during the tests: a bound socket holds it without listening."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    held_ports.append(held)
    return held.getsockname()[1]


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{HERE.parent}:{HERE}:{HERE / 'parity'}",  # this tree, whatever is installed
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


class Ranks:
    """Ranks that were started together. Leaving its `with` block kills those that still run."""

    def __init__(self, processes: list[BaseProcess], log: Path) -> None:
        self.processes, self.log = processes, log

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.kill()

    @property
    def code(self) -> int | None:
        """None while all run well; otherwise the exit code of a rank that failed, or 0 after the end of all."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def send_signal(self, number: int) -> None:
        """To every rank that still runs."""
        for process in self.processes:
            if process.is_alive():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def kill(self) -> None:
        """SIGKILL to every rank that still runs, and to the workers of all."""
        for process in self.processes:
            process.kill()
            with suppress(ProcessLookupError):  # it has just begun, or has ended and left no worker
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def wait(self, timeout_s: float) -> int:
        """The exit code of all: that of the first rank that fails, after which the others are ended."""
        end_s = time.monotonic() + timeout_s
        while self.code is None:
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            # Empty if the last one has just ended; waiting for nothing would last to the end.
            if running and not wait(running, timeout=end_s - time.monotonic()):
                raise AssertionError(f"not finished after {timeout_s} s:\n{self.log.read_text()[-4000:]}")
        code = self.code
        if code:
            self.send_signal(signal.SIGTERM)  # as launchers do
            for process in self.processes:
                process.join(GRACE_S)
            self.kill()
        return code

    def finish(self, timeout_s: float) -> str:
        """Waits for success; returns the output."""
        code = self.wait(timeout_s)
        assert code == 0, f"exit code {code}:\n{self.log.read_text()[-4000:]}"
        return self.log.read_text()


def train(*arguments: str) -> None:
    """What `python -m mirage_ds.train ARGUMENTS` does, but for the check of versions."""
    from mirage_ds import library_noise
    from mirage_ds.early_checks import read_command_line
    from mirage_ds.train import run
    from mirage_ds.training import early_end

    early_end.listen()
    sys.argv = ["mirage_ds.train", *arguments]
    command_line = read_command_line()
    library_noise.silence()
    run(command_line)


def start(
    ranks: int,
    *arguments: object,
    log: Path,
    main: Callable[..., None] = train,
    cwd: Path | None = None,
    variables: dict[str, str] | None = None,
) -> Ranks:
    """Starts `main(*arguments)` in so many processes, with their output in `log`; a single one is no rank of a group.

    Args:
        main: a function of a module.
        cwd: by default the folder of this process.
        variables: more of the environment.
    """
    # Not the user's folder for compiled ops, where a killed build would leave its lock.
    common = {"TORCH_EXTENSIONS_DIR": str(log.parent / "torch_extensions")} | (variables or {})
    if ranks > 1:
        common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    log.write_text("")
    started = Ranks([], log)
    with mock.patch.dict(os.environ, environment()):  # what the preloaded process imports with
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            begin = (os.environ | common | own, log, cwd or Path.cwd(), main, arguments)
            process = forks.Process(target=_enter, args=begin)
            process.start()
            started.processes.append(process)
    return started


def _enter(
    variables: dict[str, str], log: Path, cwd: Path, main: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    """The begin of a rank, in the fork."""
    os.setsid()  # a Ctrl-C is for the tests, which end the ranks; and kill() reaches this rank's workers
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is not forked, for its own workers
    os.environ.clear()  # the preloaded process has that of the first start
    os.environ.update(variables)
    os.chdir(cwd)
    main(*arguments)
