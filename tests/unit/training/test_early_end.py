"""When a rank ends its run early: on a signal, or before the end of its job."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirage_ds.training import early_end
from mirage_ds.training.early_end import EarlyEnd, job_end_s


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_a_wish_to_end(name: str) -> None:
    """In a process of its own, whose handlers they stay; a second one changes nothing."""
    script = (
        "import os, signal; from mirage_ds.training.early_end import EarlyEnd, listen; listen(); "
        "ask = EarlyEnd(None, 0);"
        f"print(ask()); [os.kill(os.getpid(), number) for number in (signal.{name}, signal.SIGTERM)]; print(ask())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["None", name]


@pytest.mark.parametrize(("answered", "code"), [(False, 1), (True, 0)])
def test_a_signal_that_no_step_answers_ends_the_process_and_says_where_it_was(answered: bool, code: int) -> None:
    script = (
        "import os, signal, time; from mirage_ds.training.early_end import EarlyEnd, listen; listen(grace_s=0.5)\n"
        f"def wait_for_data():\n    time.sleep({1 if answered else 600})\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        + ("print(EarlyEnd(None, 0)())\n" if answered else "")
        + "wait_for_data()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert ("in wait_for_data" in result.stderr) == (not answered)


def test_a_signal_during_the_last_save_is_remembered_and_ends_nothing() -> None:
    """One that came before it, whose time is running, too."""
    script = (
        "import os, signal, time; from mirage_ds.training import early_end; early_end.listen(grace_s=0.5)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "early_end.only_remember()\n"
        "early_end._received.clear(); os.kill(os.getpid(), signal.SIGUSR1); time.sleep(1)\n"
        "print(early_end.is_asked())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["True"]


def test_the_grace_grows_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the longest step and a minute, never more than the limit of a wait, which holds between steps."""
    clock, graces = [1000.0], []
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(early_end, "listen", graces.append)
    asked = early_end.EarlyEnd(end_s=None, margin_s=0, grace_s=400)
    for step_s in (10, 50, 20, 1000):
        clock[0] += step_s
        assert asked() is None
        asked.begin_step()
    assert graces == [400, 90, 400, 210, 400, 210, 400, 400]


def test_nohup_keeps_its_meaning() -> None:
    script = (
        "import os, signal; from mirage_ds.training.early_end import EarlyEnd, listen; listen(); "
        "os.kill(os.getpid(), signal.SIGHUP); print(EarlyEnd(None, 0)())"
    )
    result = subprocess.run(["nohup", sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["None"]


def test_the_trainer_listens_before_its_slow_imports() -> None:
    """What it has imported when it begins to listen is counted in a real start of it."""
    script = (
        "import runpy, sys, mirage_ds.training.early_end as end\n"
        "def listen():\n    print('torch' in sys.modules, 'deepspeed' in sys.modules)\n    raise SystemExit\n"
        "end.listen = listen\n"
        "runpy.run_module('mirage_ds.train', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_job_ends_within_the_margin() -> None:
    now_s = time.time()
    assert EarlyEnd(now_s + 3600, margin_s=120)() is None
    assert "the job ends in" in str(EarlyEnd(now_s + 100, margin_s=120)())


def test_the_next_step_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    early_end = EarlyEnd(end_s=2000.0, margin_s=100)
    clock[0] = 1400.0  # a step of 400 s: the next one would end at 1800
    assert early_end() is None
    clock[0] = 1800.0
    assert early_end() is not None


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, code: int = 0) -> None:
    """A command of that name, first on the path; tests/cluster/ asks the real one."""
    script = folder / "scontrol"
    script.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def test_the_end_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, monkeypatch, "JobId=7 StartTime=2026-01-02T03:04:05 EndTime=2026-01-02T04:04:05 Deadline=N/A")
    end_s = job_end_s(say=print)
    assert end_s is not None
    assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end_s)) == "2026-01-02 04:04:05"


def test_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, monkeypatch, "JobId=7 StartTime=2026-01-02T03:04:05 EndTime=Unknown")
    assert job_end_s(say=print) is None


def test_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job_end_s(say=pytest.fail) is None


def test_an_unknown_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, monkeypatch, "", code=1)
    said: list[str] = []
    assert job_end_s(say=said.append) is None
    assert "saves in time only if it gets a signal" in said[0]


def test_the_users_format_of_times_is_not_scontrols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SLURM_TIME_FORMAT=relative it prints 21:00:57; what cannot be understood is said and passed over."""
    said: list[str] = []
    scontrol(tmp_path, monkeypatch, "EndTime=2026-11-27T00:00:00$SLURM_TIME_FORMAT")
    script = tmp_path / "scontrol"
    script.write_text(script.read_text().replace("'", '"'))
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert job_end_s(said.append) == time.mktime((2026, 11, 27, 0, 0, 0, 0, 0, -1))
    scontrol(tmp_path, monkeypatch, "EndTime=21:00:57")
    assert job_end_s(said.append) is None
    assert "time limit is unknown" in said[0]
