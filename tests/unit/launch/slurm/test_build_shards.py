"""`mirage-launch build-shards` without a cluster: its two scripts, run as by SLURM, against a single build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from generated_rows import write_rows

from data_tools.build import build
from data_tools.parts import build_part
from launch import cli

NEEDS_SHELLCHECK = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command; returns its exit code and what it printed."""
    monkeypatch.setenv("HOME", str(tmp_path))  # ignore the cluster file of this user
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mirage-launch", "build-shards", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return (exit_.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sinfo with one partition, and an sbatch that only counts; returns the file with the arguments of sbatch."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (folder / "sinfo").write_text("#!/bin/sh\necho 'batch*|2'\n")
    (folder / "sbatch").write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexpr 40 + $(wc -l < {calls})\n')
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


def run_script(script: Path, **variables: str) -> str:
    """Runs a script as SLURM does, with this tree's code instead of an installed package."""
    done = subprocess.run(
        ["bash", str(script)], env=launching.environment() | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_do_what_one_build_does(launch, commands: Path, tmp_path: Path) -> None:
    rows, output = write_rows(tmp_path / "some rows"), tmp_path / "my shards"
    code, output_text, error = launch(rows, output, "--tasks", 2, "--maxcount", 3)
    assert code == 0, error
    jobs = tmp_path / "my shards.jobs"
    assert commands.read_text().splitlines() == [
        f"--parsable {jobs}/build.sh",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {jobs}/merge.sh",
    ]
    assert "array 41 (tasks: 2), and job 42" in output_text
    assert f"mirage-data check {output}" in output_text
    # Neither order nor repetition matters: a restarted task finds its part.
    for task in "1", "0", "1":
        run_script(jobs / "build.sh", SLURM_ARRAY_TASK_ID=task)
    assert "wrote 10 samples in 4 shards" in run_script(jobs / "merge.sh")
    build(rows, tmp_path / "single", maxcount=3, maxsize=10**9)
    folders = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (output, tmp_path / "single")
    ]
    assert folders[0] == folders[1]
    assert not list(tmp_path.glob("*.part-*"))


@NEEDS_SHELLCHECK
def test_shellcheck_passes(launch, tmp_path: Path) -> None:
    rows, cluster = write_rows(tmp_path / "some rows"), tmp_path / "cluster.yaml"
    cluster.write_text(
        "{partition: cpu, account: me, time: '1:00:00', sbatch: [--qos=long], setup: [module load python], "
        "environment: {A: b c}, container_image: /images/a b.sqsh, container_mounts: '/data:/data'}"
    )
    for options in [], ["--cluster", cluster]:
        code, scripts, error = launch(rows, tmp_path / "it's", "--tasks", 2, "--maxcount", 3, "--dry-run", *options)
        assert code == 0, error
        first, merge = scripts.split("#!/bin/bash\n")[1:]
        for script in first, merge:
            result = subprocess.run(
                ["shellcheck", "--shell=bash", "-"], input=f"#!/bin/bash\n{script}", capture_output=True, text=True
            )
            assert result.returncode == 0, result.stdout
    assert "#SBATCH --array=0-1\n" in first
    assert all(f"#SBATCH --{option}" in merge for option in ("partition=cpu", "account=me", "time=1:00:00", "qos=long"))
    assert not list(tmp_path.glob("it's*"))


def test_what_cannot_work_is_refused_before_submission(launch, commands: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    (tmp_path / "existing").mkdir()
    wrong = [
        ((tmp_path / "none.jsonl", tmp_path / "out", "--tasks", 2), "cannot read the rows"),
        ((rows, tmp_path / "out", "--tasks", 2), "rows: 10, shards: 1, parts: 2; each part needs"),
        ((rows, tmp_path / "existing", "--tasks", 1), "the output already exists"),
        ((rows, tmp_path / "out", "--tasks", 1, "--partition", "gpu"), "allowed: batch (2 nodes)"),
    ]
    for arguments, message in wrong:
        code, _, error = launch(*arguments)
        assert code == 2
        assert message in error
    build_part(rows, tmp_path / "mine", number=0, count=2, maxcount=5, maxsize=10**9)
    rows.write_text(rows.read_text().replace("LEFT x 1", "LEFT x 9"))  # fixed since then
    code, _, error = launch(rows, tmp_path / "mine", "--tasks", 2, "--maxcount", 5)
    assert code == 2
    assert f"rm -r {tmp_path}/mine.part-*" in error
    assert not commands.exists()
    assert not list(tmp_path.glob("out*"))
