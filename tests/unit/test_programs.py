"""The environment of other programs: nothing of the user's changes what they print, or what ranks import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.cluster import Cluster, check_partition, run_slurm
from launch.slurm.script import submission_environment
from mirage_ds.programs import plain_environment, without_current_folder
from mirage_ds.versions import versions

CHANGING = {
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_FORMAT": "%i",
    "SINFO_FORMAT": "%P",
    "SINFO_SORT": "N",
    "LANG": "de_DE.UTF-8",
    "LC_TIME": "de_DE.UTF-8",
    "GIT_DIR": "/elsewhere/.git",
}


@pytest.fixture
def changing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CHANGING.items():
        monkeypatch.setenv(name, value)


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("changing")
def test_slurms_commands_do_not_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "squeue", "env", monkeypatch)
    assert not [line for line in run_slurm("squeue").splitlines() if line.partition("=")[0] in CHANGING]
    program(tmp_path, "sinfo", "[ -z \"$SINFO_FORMAT\" ] && printf 'CLUSTER: all\\nbatch*|2\\n'", monkeypatch)
    check_partition("batch", 2)


@pytest.mark.usefixtures("changing")
def test_git_is_asked_about_this_code() -> None:
    assert versions()["git_commit"] != "unknown"


def test_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert plain_environment()["SLURM_CONF"] == "/etc/slurm.conf"


def test_an_empty_entry_of_the_python_path_is_the_current_folder() -> None:
    assert without_current_folder({"PYTHONPATH": ":/a::/b:"}) == {"PYTHONPATH": "/a:/b", "PYTHONSAFEPATH": "1"}
    assert without_current_folder({"PYTHONPATH": ":"}) == {"PYTHONSAFEPATH": "1"}


def test_ranks_do_not_import_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, whose signals `Launch` takes."""
    (tmp_path / "statistics.py").write_text("print('mine')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{os.environ.get('PYTHONPATH', '')}")
    script = (
        "import sys; sys.path = [entry for entry in sys.path if entry not in ('', sys.argv[1])];"
        "from launch.local import Launch;"
        "sys.exit(Launch([sys.executable, '-c', 'import statistics, sys; sys.exit(3)'], 1).wait())"
    )
    environment = without_current_folder(os.environ) | {"PYTHONPATH": os.environ["PYTHONPATH"]}
    environment.pop("PYTHONSAFEPATH")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 3, done.stderr
    assert "mine" not in done.stdout


def test_jobs_do_not_inherit_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":/a")
    assert submission_environment(Cluster())["PYTHONPATH"] == "/a"
