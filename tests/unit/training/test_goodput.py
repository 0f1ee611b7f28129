"""Goodput over the starts of a run, against numbers that are worked out by hand."""

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mirage_ds.training.goodput import note_first_start
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.step_sums import StepSums
from mirage_ds.zero3 import distributed

BEGAN = 1_780_000_000.0
STEP_S, LOADING_S = 10, 20


class Clock:
    """Both clocks of the host; the monotonic one starts anywhere."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    gc.collect()  # now: the data workers of an earlier test would be waited for by a clock that stands still
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: BEGAN + clock.now_s)
    monkeypatch.setattr(time, "monotonic", lambda: 77.0 + clock.now_s)
    return clock


@pytest.fixture
def train(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A start that loads and then trains some steps."""
    for name, value in {"world_size": 1, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])

    def train(run: Path, steps: range, skipped: tuple[int, ...] = (), log_freq: int = 1) -> None:
        note_first_start(run, time.time())
        clock.sleep(LOADING_S)
        metrics = Metrics(
            run, stage="text", global_batch_size=1, max_steps=100, log_freq=log_freq, steps_done=steps[0] - 1
        )
        for number in steps:
            started_s = time.monotonic()
            clock.sleep(STEP_S)
            metrics.add(
                StepSums(number, number, torch.ones(3), 0, 1, 1, 1e-4, 1.0, 0, started_s, is_skipped=number in skipped)
            )
        metrics.close()

    return train


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def goodput(run: Path) -> list[float]:
    return [record["goodput_pct"] for record in records(run)]


def test_a_start_loses_what_it_takes_to_load(train: Callable[..., None], tmp_path: Path) -> None:
    train(tmp_path, range(1, 5))
    assert goodput(tmp_path) == pytest.approx([100 * 10 / 30, 100 * 20 / 40, 100 * 30 / 50, 100 * 40 / 60])


def test_every_step_has_the_goodput_of_its_own_end(train: Callable[..., None], tmp_path: Path) -> None:
    train(tmp_path, range(1, 5), log_freq=4)
    assert goodput(tmp_path) == pytest.approx([100 * 10 / 30, 100 * 20 / 40, 100 * 30 / 50, 100 * 40 / 60])


def test_repeated_steps_count_once_and_waiting_counts_against_it(
    train: Callable[..., None], clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at 60 s after step 4, with step 2 saved; queued for 40 s; then steps 3 and 4 again, and a skipped one."""
    train(tmp_path, range(1, 5))
    assert "goodput" not in capsys.readouterr().out
    clock.sleep(40)
    train(tmp_path, range(3, 6), skipped=(5,))  # from 120 s on
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert goodput(tmp_path)[2:] == pytest.approx([100 * 30 / 130, 100 * 40 / 140, 100 * 40 / 150])
    assert " | goodput 29% | " in capsys.readouterr().out


def test_a_start_that_saved_nothing_counts_for_nothing(
    train: Callable[..., None], clock: Clock, tmp_path: Path
) -> None:
    """Its time does: 60 s. The next start begins with step 1."""
    train(tmp_path, range(1, 5))
    train(tmp_path, range(1, 3))
    assert goodput(tmp_path) == pytest.approx([100 * 10 / 90, 100 * 20 / 100])


def test_a_copied_run_folder_keeps_its_history(train: Callable[..., None], clock: Clock, tmp_path: Path) -> None:
    """The records suffice: they have both numbers."""
    (tmp_path / "a").mkdir()
    train(tmp_path / "a", range(1, 5))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "first_start.json").unlink()
    train(tmp_path / "b", range(3, 4))
    assert goodput(tmp_path / "b")[-1] == pytest.approx(100 * 30 / 90)


def test_without_its_records_only_this_start_counts(train: Callable[..., None], clock: Clock, tmp_path: Path) -> None:
    """Of records that were deleted, or that an older version wrote, no step counts, and the time does."""
    train(tmp_path, range(1, 5))
    file = tmp_path / "metrics.jsonl"
    old = [{name: record[name] for name in ("step", "loss", "step_s")} for record in records(tmp_path)]
    file.write_text("".join(json.dumps(record) + "\n" for record in old))
    train(tmp_path, range(3, 4))
    assert records(tmp_path)[-1]["goodput_pct"] == pytest.approx(100 * 10 / 90)


@pytest.mark.parametrize("content", ["", '{"time": 17', "[]", '{"time": null}'])
def test_a_damaged_first_start_is_written_again(train: Callable[..., None], tmp_path: Path, content: str) -> None:
    (tmp_path / "first_start.json").write_text(content)
    train(tmp_path, range(1, 2))
    assert goodput(tmp_path) == pytest.approx([100 * 10 / 30])
    assert json.loads((tmp_path / "first_start.json").read_text()) == {"time": BEGAN}


def test_a_clock_behind_the_first_start(train: Callable[..., None], tmp_path: Path) -> None:
    """By the clock, the first step ends as the run starts, and the second one 10 s later."""
    note_first_start(tmp_path, BEGAN + LOADING_S + STEP_S)
    train(tmp_path, range(1, 4), skipped=(1,))
    assert goodput(tmp_path) == pytest.approx([0, 100 * 10 / 10, 100 * 20 / 20])
    (tmp_path / "earlier").mkdir()
    note_first_start(tmp_path / "earlier", BEGAN + 1000)
    train(tmp_path / "earlier", range(1, 2))
    assert goodput(tmp_path / "earlier") == pytest.approx([100])
