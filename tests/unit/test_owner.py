"""One start at a time writes to a run's folder: who is refused, who takes over, on one machine and between several."""

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from mirage_ds import owner as rules
from mirage_ds.errors import OwnerError
from mirage_ds.owner import Owner, newest, of_output, of_run, refuse_living

forks = multiprocessing.get_context("fork")


def change(run: Path, **values: Any) -> None:
    """What another process writes into the current owner's file."""
    number, record = newest(run / "owner")
    (run / "owner" / f"{number}.json").write_text(json.dumps(record | values))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def elsewhere(run: Path) -> Owner:
    """The owner of the run, as a process on another machine."""
    owner = of_run(run)
    owner.record["machine"] = "another"
    assert owner.try_to_claim()
    return owner


def test_the_second_start_says_who_where_and_since_when(run: Path) -> None:
    first = of_run(run)
    assert first.try_to_claim()
    first.check(7)
    first.write()
    for refused in (lambda: of_run(run).try_to_claim(), lambda: refuse_living(run)):
        with pytest.raises(OwnerError) as error:
            refused()
        for words in (f"process {os.getpid()} on {first.record['host']}, since 20", "last sign of life 20", "step 7;"):
            assert words in str(error.value)
    first.release()
    refuse_living(run)
    assert of_run(run).try_to_claim()


def compete(run: Path, delay_s: float, answer: Connection) -> None:
    time.sleep(delay_s)
    try:
        while not (owner := of_run(run)).try_to_claim():
            pass
    except OwnerError:
        answer.send(0)
    else:
        answer.send(owner.number)
    answer.recv()  # the winner lives until all have tried
    os._exit(0)


def test_of_several_starts_at_once_exactly_one_wins(tmp_path: Path) -> None:
    """Twenty times, four processes each, with random delays; every second time the last owner was killed."""
    draw = random.Random(0)
    for turn in range(20):
        run = tmp_path / str(turn // 2)
        pipes, processes = [], []
        for _ in range(4):
            ours, theirs = forks.Pipe()
            process = forks.Process(target=compete, args=(run, draw.choice([0, 0, draw.random() / 100]), theirs))
            process.start()
            pipes.append(ours)
            processes.append(process)
        answers = [pipe.recv() for pipe in pipes]
        assert sorted(answers) == [0, 0, 0, 1 + turn % 2]
        for process in processes:
            process.kill()
            process.join()


def test_a_killed_owner_is_taken_over_with_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = forks.Pipe()
    process = forks.Process(target=compete, args=(run, 0, theirs))
    process.start()
    assert ours.recv() == 1
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie still has its number
    assert of_run(run).try_to_claim()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"takes over this run (run.dir={run}) from process {process.pid} on ")
    assert line.endswith(": that process has ended")
    process.join()


def test_an_owner_elsewhere_that_gives_signs_of_life_is_left_alone(run: Path, elsewhere: Owner) -> None:
    start = of_run(run)
    assert not start.try_to_claim()
    assert not start.try_to_claim()
    change(run, seen=time.time() + 10)
    with pytest.raises(OwnerError, match="another program writes to this run"):
        start.try_to_claim()


@pytest.mark.parametrize("content", [None, b"", b"\0\0"], ids=["whole", "empty", "spoiled"])
def test_an_owner_elsewhere_that_is_silent_is_taken_over(
    run: Path,
    elsewhere: Owner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
) -> None:
    """Whatever the clocks say; the one that was taken to have ended learns of it."""
    change(run, seen=time.time() + 1e6)
    if content is not None:
        (run / "owner" / "1.json").write_bytes(content)
    monkeypatch.setattr(rules, "SILENT_S", 0.2)
    start = of_run(run)
    assert not start.try_to_claim()
    time.sleep(0.3)
    assert start.try_to_claim()
    assert "it has given no sign of life for 0.2 s" in capsys.readouterr().err
    assert [path.name for path in (run / "owner").iterdir()] == ["2.json"]


def test_who_was_taken_over_writes_no_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BEAT_S", 0.01)
    first = of_run(run)
    assert first.try_to_claim()
    first.check(1)
    (run / "owner" / "2.json").write_text(json.dumps(of_run(run).record))
    first.thread.join(timeout=60)
    with pytest.raises(OwnerError, match="another program has taken over this run"):
        first.check(2)
    first.release()
    assert newest(run / "owner")[0] == 2


def test_signs_of_life_do_not_wait_for_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BEAT_S", 0.01)
    first = of_run(run)
    assert first.try_to_claim()
    before = newest(run / "owner")[1]
    end_s = time.monotonic() + 60
    while newest(run / "owner")[1]["seen"] == before["seen"]:
        assert time.monotonic() < end_s
    first.release()


def test_a_requeued_job_does_not_lock_itself_out(
    run: Path, elsewhere: Owner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SLURM restarts a job elsewhere only when its last start is over; another job must wait for signs of life."""
    change(run, job="7", restart="0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not of_run(run).try_to_claim()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert of_run(run).try_to_claim()
    assert "SLURM has ended that start of job 7" in capsys.readouterr().err


def test_a_start_that_wrote_nothing_leaves_nothing(run: Path) -> None:
    for owner in (of_run(run), of_output(run)):
        assert owner.try_to_claim()
        owner.release()
    assert not list(run.parent.rglob("*.json"))


def test_a_late_start_does_not_take_a_living_owner_for_a_dead_one(run: Path) -> None:
    """It has seen a dead owner; since then one has taken over and left, and another one lives with a lower number."""
    (run / "owner").mkdir(parents=True)
    (run / "owner" / "3.json").write_text(json.dumps(of_run(run).record | {"process": "another"}))
    late = of_run(run)
    _, dead = newest(late.folder)
    between = of_run(run)
    assert between.try_to_claim()
    between.release()
    living = of_run(run)
    assert living.try_to_claim()
    assert living.number == 1
    assert not late.make(4, dead)
    assert newest(run / "owner") == (1, living.record)
    with pytest.raises(OwnerError):
        late.try_to_claim()


def test_an_owner_that_was_asleep_learns_that_it_was_replaced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has come and gone, or has ended and been followed by one with the same number."""
    monkeypatch.setattr(rules, "BEAT_S", 1000)
    first = of_run(run)
    assert first.try_to_claim()
    (run / "owner" / "1.json").unlink()
    first.check(1)  # not at every step
    first.record["seen"] -= 3000
    with pytest.raises(OwnerError, match="another program has taken over this run"):
        first.check(2)
    second = of_run(run)
    assert second.try_to_claim()
    first.release()
    assert newest(run / "owner") == (1, second.record)
