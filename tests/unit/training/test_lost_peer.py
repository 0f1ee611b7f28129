"""A rank whose collective fails, mostly because another rank has left: by real processes, and what it then prints."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import launching
import pytest
import torch
import torch.distributed

from mirage_ds import train
from mirage_ds.config import Config
from mirage_ds.recipe import load_config
from mirage_ds.training import early_end, lost_peer
from mirage_ds.training.lost_peer import is_lost_peer

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
MESSAGE = "error: rank 3 cannot continue: Connection closed by peer [127.0.0.1]:1\n"


def wait_for_rank_1() -> None:
    """Rank 1 leaves once both are there; rank 0 waits for it in a collective of gloo's."""
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if os.environ["RANK"] == "1":
        os._exit(0)
    try:
        torch.distributed.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        print(is_lost_peer(error), error)


def leave(patience_s: float, heard: int | None = None, ago_s: float = 0) -> None:
    """After it has heard a signal, so many seconds ago."""
    early_end.listen()
    if heard is not None:
        os.kill(os.getpid(), heard)
        time.sleep(ago_s)
    print("ready")
    os.close(sys.stdout.fileno())  # the message is for stderr
    lost_peer.leave(RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"), patience_s=patience_s)


def start(log: Path, *arguments: float) -> launching.Ranks:
    return launching.start(1, *arguments, main=leave, log=log, variables={"RANK": "3"})


def test_a_real_peer_that_left_is_known(tmp_path: Path) -> None:
    with launching.start(2, main=wait_for_rank_1, log=tmp_path / "log") as ranks:
        assert ranks.finish(timeout_s=600).startswith("True ")


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


def wait_for_nccl() -> None:
    """What a timeout is under NCCL: a thread of C++ ends the process, while Python waits elsewhere."""
    config = load_config(RECIPE)
    with mock.patch.object(train, "train", wait_in_a_collective):
        train.run(config)


def wait_in_a_collective(config: Config) -> None:
    threading.Timer(0.1, os.abort).start()
    time.sleep(600)


def test_a_rank_that_nccl_ends_shows_where_it_waited(tmp_path: Path) -> None:
    with launching.start(1, main=wait_for_nccl, log=tmp_path / "log") as ranks:
        assert ranks.wait(timeout_s=600) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ranks.log.read_text()
    assert " in wait_in_a_collective" in ranks.log.read_text()


@pytest.mark.parametrize("before", [True, False])
def test_silent_if_the_launcher_ends_it(tmp_path: Path, before: bool) -> None:
    """The launcher's signal may come before the collective fails, or after."""
    with start(tmp_path / "log", 600, *([signal.SIGTERM] if before else [])) as ranks:
        while ranks.code is None and "ready" not in ranks.log.read_text():
            time.sleep(0.05)
        if not before:
            time.sleep(0.2)  # it most likely waits by now; the signal would be heard as well if it did not
            ranks.send_signal(signal.SIGTERM)
        assert ranks.wait(timeout_s=600) == 1
    assert ranks.log.read_text() == "ready\n"


def test_a_signal_of_long_ago_is_not_the_launchers(tmp_path: Path) -> None:
    """The run was asked to save, and while it saves a connection breaks: that must not end silently."""
    with start(tmp_path / "log", 0.2, signal.SIGUSR1, 0.4) as ranks:
        assert ranks.wait(timeout_s=600) == 1
    assert ranks.log.read_text() == "ready\n" + MESSAGE


def test_one_line_if_nobody_ends_it(tmp_path: Path) -> None:
    with start(tmp_path / "log", 0.1) as ranks:
        assert ranks.wait(timeout_s=600) == 1
    assert ranks.log.read_text() == "ready\n" + MESSAGE
