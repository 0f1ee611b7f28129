"""Starts real processes: DeepSpeed's launcher on this machine, with ranks that have one thread each."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent


held_ports: list[socket.socket] = []


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


def start(ranks: int, *arguments: str, log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """`deepspeed --num_accelerators RANKS ARGUMENTS`, its output in `log`."""
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *arguments],
            # Not the user's folder for compiled ops, where a killed build would leave its lock.
            env=environment() | {"TORCH_EXTENSIONS_DIR": str(log.parent / "torch_extensions")},
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def finish(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> str:
    """Waits for a launch to succeed; returns its output."""
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not finished after {timeout_s} s:\n{log.read_text()[-4000:]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a signal to the launcher alone would leave its ranks behind
    assert code == 0, log.read_text()[-4000:]
    return log.read_text()
