"""A rank whose collective fails because another rank has left: by real processes, and what it then prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
import torch

from mirage_ds.training.lost_peer import is_lost_peer

# Rank 1 leaves once both are there; rank 0 waits for it in a collective of gloo's.
TWO_RANKS = """
import os, sys
import torch, torch.distributed as dist
from mirage_ds.training.lost_peer import is_lost_peer

rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
dist.barrier()
if rank == 1:
    os._exit(2)
try:
    dist.all_reduce(torch.zeros(1))
except RuntimeError as error:
    print(is_lost_peer(error), error)
"""

LEAVE = """
import sys
from mirage_ds.training import early_end, lost_peer
early_end.listen()
print("ready", flush=True)
lost_peer.leave(RuntimeError("Connection closed by peer [127.0.0.1]:1\\nmore"), patience_s=float(sys.argv[1]))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        env=launching.environment() | {"RANK": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_peer_that_left_is_known(tmp_path: Path) -> None:
    output, errors = start(TWO_RANKS, str(tmp_path / "store")).communicate(timeout=600)
    assert output.startswith("True "), output + errors


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),  # a hang: every traceback tells
        RuntimeError("shape '[2]' is invalid for input of size 3"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),  # by the system: no memory
    ],
)
def test_other_errors_are_not(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert is_lost_peer(RuntimeError("Connection reset by peer"))
    assert not is_lost_peer(error)


def test_a_connection_to_somewhere_else_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed download or build, before the ranks have joined or where there is one rank alone."""
    error = RuntimeError("Data processing error: Connection reset by peer (os error 104)")
    assert not is_lost_peer(error)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert not is_lost_peer(error)


@pytest.mark.parametrize("before", [True, False])
def test_silent_if_the_launcher_ends_it(before: bool) -> None:
    """The launcher's signal may come before the collective fails, or after."""
    code = LEAVE.replace("print(", "import os; os.kill(os.getpid(), 15); print(", 1) if before else LEAVE
    process = start(code, "600")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if not before:
        time.sleep(0.2)  # it most likely waits by now; the signal would be heard as well if it did not
        os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, output, errors) == (1, "", "")


def test_a_signal_of_long_ago_is_not_the_launchers() -> None:
    """The run was asked to save, and while it saves a connection breaks: that must not end silently."""
    code = LEAVE.replace("print(", "import os, time; os.kill(os.getpid(), 10); time.sleep(0.4); print(", 1)
    errors = start(code, "0.2").communicate(timeout=600)[1]
    assert errors == "error: rank 3 cannot continue: Connection closed by peer [127.0.0.1]:1\n"


def test_one_line_if_nobody_ends_it() -> None:
    process = start(LEAVE, "0.1")
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert errors == "error: rank 3 cannot continue: Connection closed by peer [127.0.0.1]:1\n"
