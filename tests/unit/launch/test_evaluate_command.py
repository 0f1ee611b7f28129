"""`mirage-launch evaluate` without a cluster: what it starts, submits and refuses; its script run as by SLURM."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
from generated_rows import write_jsonl

from launch import cli, evaluate
from launch.slurm.cluster import Cluster

NEEDS_SHELLCHECK = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command; returns its exit code and what it printed."""
    monkeypatch.setenv("HOME", str(tmp_path))  # ignore the cluster file of this user
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mirage-launch", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return (exit_.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Those of `mirage evaluate`, with a model that has a config only: nothing is loaded here."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "Which way?"}] * 3)
    names = {"model": tmp_path / "model", "task": "none", "data": rows, "output": tmp_path / "out" / "my results"}
    return [text for name, value in names.items() for text in (f"--{name}", str(value))]


def test_starts_ranks_with_the_options_as_they_are(
    launch, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = []

    class Launch:
        def __init__(self, command: list[str], num_ranks: int, on_interrupt: str) -> None:
            started.append((command[1:], num_ranks))

        def wait(self) -> int:
            return 5

    monkeypatch.setattr(evaluate, "Launch", Launch)
    code, _, _ = launch("--latents", "own,mean", *options, "--ranks", 3, "--limit=2")
    assert code == 5  # that of the ranks
    expected = ["-u", "-m", "mirage_ds.cli", "evaluate", "--latents", "own,mean", *options, "--limit=2"]
    assert started == [(expected, 3)]
    launch(*options)
    assert started[1][1] == 1  # without a GPU
    assert not (tmp_path / "out").exists()


def test_what_the_ranks_will_say_is_not_said_twice(
    launch, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate, "Launch", lambda *_, **__: SimpleNamespace(wait=lambda: 0))
    rows = write_jsonl(tmp_path / "some.jsonl", [{"text_input": "?"}, {"text_input": "?", "text_output": "yes"}])
    assert launch(*options, "--task", "exact", "--data", rows) == (0, "", "")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--task", "nope"), "unknown task 'nope' (--task)"),
        (("--data", "nope.jsonl"), "No such file or directory"),
        (("--samples", "4"), "more need a temperature above 0"),
        (("--samples", "many"), "Invalid value for '--samples'"),
        (("--batchsize", "4"), "No such option: --batchsize"),
        (("--output",), "Option '--output' requires an argument"),
        (("--by", "nope"), "no row has the field 'nope' (--by)"),
        (("--partition", "batch"), "options of a job without --nodes"),
        (("--nodes", "2", "--ranks", "2"), "--ranks and --nodes are both set"),
        (("--nodes", "2"), "the ranks per node are not set"),
        (("--nodes", "2", "--gpus-per-node", "8", "--sbatch", "--array=1-4"), "invalid sbatch option"),
        (("--nodes", "2", "--gpus-per-node", "8", "--limit", "0"), "Invalid value for '--limit'"),
    ],
)
def test_refused_before_anything_starts(
    launch, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(evaluate, "Launch", None)
    code, _, error = launch(*options, *more)
    assert code == 2
    assert words in " ".join(re.sub("[\u2500-\u257f]", " ", error).split())  # without the frame of usage errors
    assert not (tmp_path / "out").exists()


def test_the_script(launch, options: list[str], tmp_path: Path) -> None:
    job = ("--nodes", 2, "--gpus-per-node", 4, "--time", "1:00:00", "--partition", "gpu", "--sbatch", "--qos=long")
    code, script, error = launch(*options, *job, "--samples", 8, "--temperature", 0.7, "--dry-run")
    assert code == 0, error
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=2", "--mem=0"):
        assert f"#SBATCH {line}\n" in script
    for line in ("--time=1:00:00", "--partition=gpu", "--qos=long", "--requeue", "--open-mode=append"):
        assert re.search(rf"^#SBATCH {line}\b", script, re.MULTILINE)
    arguments = shlex.join([*options, "--samples", "8", "--temperature", "0.7"])
    assert f'--cpus-per-task=2 "$python" -u -m mirage_ds.cli evaluate {arguments} &\n' in script
    assert not (tmp_path / "out").exists()


@NEEDS_SHELLCHECK
def test_shellcheck(options: list[str], tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(evaluate.render(options, tmp_path / "out", Cluster(gpus_per_node=8), 2, tmp_path))
    done = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands, which only note their arguments; returns the folder of the notes."""
    folder, notes = tmp_path / "bin", tmp_path / "notes"
    folder.mkdir()
    notes.mkdir()
    answers = {"sinfo": "echo 'batch*|2'", "squeue": "true", "sbatch": "echo 41", "scontrol": "echo node1"}
    for name, answer in answers.items():
        (folder / name).write_text(f'#!/bin/sh\necho "$*" >> {notes}/{name}\n{answer}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return notes


def test_submits_a_job_of_its_own_code(launch, options: list[str], commands: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        code, text, error = launch(*options, "--nodes", 2, "--ranks-per-node", 1)
        assert code == 0, error
        job = tmp_path / "out" / "my results.jobs" / str(number)
        assert (job / "code" / "mirage_ds" / "cli.py").exists()
        assert (commands / "sbatch").read_text().splitlines()[-1] == f"--parsable {job / 'job.sh'}"
        assert "submitted     job 41 (nodes: 2, ranks per node: 1)" in text
        assert "export DS_ACCELERATOR=cpu\n" in (job / "job.sh").read_text()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '7|PENDING|{job}/job.sh'\n")
    code, _, error = launch(*options, "--nodes", 2, "--ranks-per-node", 1)
    assert code == 2
    assert "the evaluation already has a job (--output" in error
    assert "7 is PENDING" in error


# An srun that adds a batch to the parts, if it is told so, and then runs until it gets a signal.
SRUN = """#!/bin/bash
trap 'exit 143' TERM
mkdir -p "$PARTS"
[ "$ANSWERS" = 0 ] || echo '{{}}' >> "$PARTS/rank_0.jsonl"
touch "$PARTS/started"
[ -n "$ENDS" ] && exit "$ENDS"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("answers", "ends", "number", "code", "requeued"),
    [
        (1, "", signal.SIGUSR1, 143, True),
        (0, "", signal.SIGUSR1, 143, False),  # a limit that is too short would requeue it forever
        (1, "", signal.SIGTERM, 143, False),  # SLURM requeues what it preempts; what a user cancelled must end
        (1, "0", None, 0, False),
        (1, "2", None, 2, False),  # a user's mistake
    ],
)
def test_requeued_before_the_time_limit(
    options: list[str],
    commands: Path,
    tmp_path: Path,
    answers: int,
    ends: str,
    number: signal.Signals | None,
    code: int,
    requeued: bool,
) -> None:
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    output, script = tmp_path / "out", tmp_path / "job.sh"
    script.write_text(evaluate.render(options, output, Cluster(ranks_per_node=1), 1, tmp_path / "job"))
    variables = {"PARTS": f"{output}.parts", "ANSWERS": str(answers), "ENDS": ends}
    variables |= {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node1", "PATH": os.environ["PATH"]}
    process = subprocess.Popen(["bash", str(script)], env=launching.environment() | variables)
    deadline_s = time.monotonic() + 60
    while number and not (tmp_path / "out.parts" / "started").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    if number:
        process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert ("requeue 9" in (commands / "scontrol").read_text()) == requeued
