"""Heartbeats: few writes, and yet the last step of a rank that hangs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.training import heartbeat
from mirage_ds.training.heartbeat import Heartbeat


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the timer that prints the stacks of a rank without a beat."""
    calls: list[str] = []
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", lambda seconds: calls.append(f"{seconds} s"))
    monkeypatch.setattr(heartbeat.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    return calls


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "heartbeat" / "rank_3").read_text())


def test_the_first_and_the_last_beat_are_written_and_every_beat_winds_the_timer(
    tmp_path: Path, timers: list[str]
) -> None:
    with Heartbeat(tmp_path, rank=3, timeout_s=60, step=4) as beating:
        first = (tmp_path / "heartbeat" / "rank_3").stat()
        assert read(tmp_path)["step"] == 4
        for step in range(5, 105):
            beating.beat(step)
        assert (tmp_path / "heartbeat" / "rank_3").stat() == first  # within 10 s
    assert read(tmp_path)["step"] == 104
    assert timers == ["60 s"] * 101 + ["cancelled"]


def test_a_rank_that_hangs_is_found_at_its_last_step(
    tmp_path: Path, timers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It beats no more, and its last beat is written nevertheless, with the time of that beat."""
    monkeypatch.setattr(heartbeat, "WRITE_S", 0.01)
    with Heartbeat(tmp_path, rank=3, timeout_s=60, step=0) as beating:
        beating.beat(1)
        end_s = time.monotonic() + 60
        while read(tmp_path)["step"] < 1 and time.monotonic() < end_s:
            time.sleep(0.01)
        assert read(tmp_path) == beating.last
        written = (tmp_path / "heartbeat" / "rank_3").stat()
        time.sleep(0.05)
        assert (tmp_path / "heartbeat" / "rank_3").stat() == written  # not again


def test_an_error_leaves_the_last_step_and_the_timer(tmp_path: Path, timers: list[str]) -> None:
    def train() -> None:
        with Heartbeat(tmp_path, rank=3, timeout_s=60, step=0) as beating:
            beating.beat(7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert read(tmp_path)["step"] == 7
    assert "cancelled" not in timers


def test_a_heartbeat_that_cannot_be_written_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeat").touch()
    with Heartbeat(tmp_path, rank=0, timeout_s=1000, step=0) as beating:
        beating.beat(1)
    assert capfd.readouterr().err.count("WARNING: no heartbeat was written") == 1
