"""Ranks as the tests start them: what they get, how they end, and that none is left."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import launching
import psutil
import pytest


def show() -> None:
    """Rank, folder, and the preloaded process: its threads, and whether it has the trainer."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "OWN")
    print(*(os.environ.get(name) for name in names), Path.cwd(), "mirage_ds.train" in sys.modules)
    print("threads", psutil.Process(os.getppid()).num_threads())


def fail_on_rank_1(message: str) -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError(message)
    time.sleep(600)


def leave(code: int) -> None:
    sys.exit(code)


def hang(folder: Path) -> None:
    """Also after SIGTERM, and with a process of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    (folder / f"{os.getpid()}").touch()
    print("child" if child == 0 else "hangs", flush=True)
    time.sleep(600)


def test_two_ranks(tmp_path: Path) -> None:
    """A preloaded process with threads could not be forked safely."""
    with launching.start(2, main=show, log=tmp_path / "log", cwd=tmp_path, variables={"OWN": "x"}) as ranks:
        lines = ranks.finish(timeout_s=120).splitlines()
    assert sorted(lines) == [f"{n} {n} 2 1 cpu x {tmp_path} True" for n in (0, 1)] + ["threads 1"] * 2
    assert "RANK" not in os.environ


def test_a_single_process_is_no_rank(tmp_path: Path) -> None:
    with launching.start(1, main=show, log=tmp_path / "log") as ranks:
        assert ranks.finish(timeout_s=120).startswith("None None None 1 cpu None")


def test_the_exit_code(tmp_path: Path) -> None:
    with launching.start(1, 7, main=leave, log=tmp_path / "log") as ranks:
        assert ranks.wait(timeout_s=120) == 7


def test_a_rank_that_fails_ends_the_others_and_its_message_is_shown(tmp_path: Path) -> None:
    with (
        launching.start(2, "the reason", main=fail_on_rank_1, log=tmp_path / "log") as ranks,
        pytest.raises(AssertionError, match=r"exit code 1:(.|\n)*RuntimeError: the reason"),
    ):
        ranks.finish(timeout_s=120)
    assert [process.exitcode for process in ranks.processes] == [-signal.SIGTERM, 1]


def test_ranks_that_hang_are_killed_with_their_children(tmp_path: Path) -> None:
    with launching.start(2, tmp_path, main=hang, log=tmp_path / "log") as ranks:
        while len(started := [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]) < 4:
            assert ranks.code is None
            time.sleep(0.05)
        with pytest.raises(AssertionError, match=r"not finished after 0\.5 s:(.|\n)*hangs"):
            ranks.finish(timeout_s=0.5)
    assert [process.exitcode for process in ranks.processes] == [-signal.SIGKILL] * 2
    deadline_s = time.monotonic() + 60
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
