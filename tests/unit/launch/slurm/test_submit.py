"""`mirage-launch slurm` without a cluster: what is refused, with which message, and whether its script is valid bash.

Small scripts replace SLURM's commands here; tests/cluster uses the real ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app
from launch.slurm.submit import seconds
from mirage_ds.errors import ConfigError, DataError, MirageError
from mirage_ds.recipe import load_config

COMMANDS = {
    "sinfo": "printf 'batch*|2\\nbatch*|1\\nurgent|8\\n'",
    "squeue": "cat queue",
    "sbatch": 'echo "$@" > submitted; env > environment; echo 42',
}
TRAIN = {"stage": "stage1", "max_steps": 20, "global_batch_size": 8}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and shards, on a login node."""
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue").write_text("7|RUNNING|/elsewhere/job.sh\n8|PENDING|(null)\n")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"0" * 10)
    shard = {"name": "a.tar", "samples": 1, "bytes": 10, "sha256": ""}
    manifest = {"format_version": 1, "num_samples": 1, "index_sha256": "", "shards": [shard]}
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    recipe = {"run": {"dir": "a run"}, "model": {"path": "Qwen/Q"}, "data": {"shards": "shards"}, "train": TRAIN}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def submit(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["slurm", "recipe.yaml", *arguments])
    if isinstance(result.exception, MirageError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--nodes", "4"], ConfigError, r"too few nodes \(--nodes 4, partition batch with 3\); .* urgent \(8 nodes\)"),
        (["--nodes", "2", "--partition", "nope"], ConfigError, r"no such partition \(--partition nope\); .*batch \(3"),
        (["--nodes", "3"], ConfigError, "=8 does not divide over 6 ranks .* multiples of 6; .*global_batch_size=12,"),
        (["--nodes", "2", "data.shards=gone"], DataError, "no manifest.json"),
        (["--nodes", "2", "evaluation.shards=gone"], DataError, "no manifest.json"),
        (["--nodes", "2", "model.path=./gone"], ConfigError, "the model folder does not exist"),
        (["--nodes", "2", "run.init_from=gone"], DataError, "the run to start from does not exist"),
        (["--nodes", "2", "train.lrr=1"], ConfigError, "train.lrr"),
        (["--nodes", "2", "--time", "2"], ConfigError, r"limit is 120 s \(--time 2\), but run.save_before_end_s=120"),
        (["--nodes", "2", "--time", "2h"], ConfigError, "invalid time limit .*24:00:00"),
        (["--nodes", "2", "--sbatch", "qos=long"], ConfigError, "'qos=long'"),
        (["--nodes", "2", "--sbatch", "--array=1-4"], ConfigError, "'--array=1-4'"),
        (["--nodes", "2", "--cluster", "nope"], ConfigError, "no such cluster .* example"),
    ],
)
def test_refused_before_anything_is_written(here: Path, arguments: list[str], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        submit("--ranks-per-node", "2", *arguments)
    assert not (here / "a run").exists()
    assert not (here / "submitted").exists()


def test_a_shard_that_was_not_copied_completely(here: Path) -> None:
    (here / "shards" / "a.tar").write_bytes(b"0")
    with pytest.raises(DataError, match=r"a\.tar"):
        submit("--nodes", "1", "--ranks-per-node", "1")


def test_the_ranks_per_node_are_not_set(here: Path) -> None:
    with pytest.raises(ConfigError, match="set --gpus-per-node, or --ranks-per-node"):
        submit("--nodes", "1")


def test_without_slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bin" / "sinfo").unlink()
    monkeypatch.setenv("PATH", str(here / "bin"))
    with pytest.raises(ConfigError, match="sinfo is not installed"):
        submit("--nodes", "1", "--ranks-per-node", "1")


def test_slurm_rejects_the_job(here: Path) -> None:
    (here / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="Invalid account"):
        submit("--nodes", "1", "--ranks-per-node", "1")
    assert not list((here / "a run" / "jobs").iterdir())


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("30", 1800), ("2:30", 150), ("24:00:00", 86400), ("1-2", 93600), ("1-2:03:04", 93784), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_does(limit: str, wanted: int | None) -> None:
    assert seconds(limit) == wanted


def test_a_run_has_one_job_at_a_time(here: Path) -> None:
    submit("--nodes", "1", "--ranks-per-node", "1")
    (here / "queue").write_text(f"7|RUNNING|/elsewhere/job.sh\n41|PENDING|{here / 'a run' / 'jobs' / '1' / 'job.sh'}\n")
    with pytest.raises(ConfigError, match="41 is PENDING"):
        submit("--nodes", "1", "--ranks-per-node", "1")
    (here / "queue").write_text("7|RUNNING|/elsewhere/job.sh\n")
    submit("--nodes", "1", "--ranks-per-node", "1")
    assert (here / "a run" / "jobs" / "2" / "job.sh").exists()


def test_variables_of_the_shell_do_not_override_the_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those of another job, inside which the command may run."""
    removed = ("SBATCH_NO_REQUEUE", "SBATCH_OUTPUT", "SBATCH_EXPORT", "SBATCH_TIMELIMIT", "SLURM_CPU_BIND", "RANK")
    kept = ("SLURM_CONF", "SBATCH_PARTITION", "NCCL_DEBUG")
    for name in removed + kept:
        monkeypatch.setenv(name, "of the shell")
    submit("--nodes", "1", "--ranks-per-node", "1", "--time", "60")
    handed_on = {line.split("=")[0] for line in (here / "environment").read_text().splitlines()}
    assert not handed_on & set(removed)
    assert handed_on >= set(kept)


def test_the_job_has_its_own_recipe_and_code(here: Path) -> None:
    output = submit("--nodes", "1", "--ranks-per-node", "1", "train.lr=0.5")
    job = here / "a run" / "jobs" / "1"
    assert (here / "submitted").read_text().split(maxsplit=1)[1].strip() == str(job / "job.sh")
    for words in ("job 42", str(job / "log"), "tensorboard --logdir", "scancel 42"):
        assert words in output
    config = load_config(job / "recipe.yaml")
    assert (config.train.lr, config.run.resume) == (0.5, "auto")
    # Python finds the copy, from any folder
    show = (
        "import mirage_ds.config as config, launch.slurm.attempts, ds_configs; "
        "print(config.__file__, ds_configs.__path__[0])"
    )
    found = subprocess.run(
        [sys.executable, "-c", show],
        env=os.environ | {"PYTHONPATH": str(job / "code"), "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found.strip() == f"{job / 'code/mirage_ds/config.py'} {job / 'code/ds_configs'}"


def test_a_cluster_file_and_the_command_line(here: Path) -> None:
    own = here / "home" / ".config" / "mirage" / "cluster.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(yaml.safe_dump({"partition": "urgent", "gpus_per_node": 4, "sbatch": ["--exclusive"]}))
    script = submit("--nodes", "2", "--time", "1:00:00", "--sbatch", "--qos=long", "--dry-run")
    lines = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    wanted = ["--partition=urgent", "--time=1:00:00", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4"]
    assert set(lines) >= {*wanted, "--exclusive", "--qos=long", "--requeue", "--signal=B:USR1@120"}
    assert "--partition=batch" in submit("--nodes", "2", "--partition", "batch", "--dry-run")
    cpu = submit("--nodes", "2", "--ranks-per-node", "2", "--dry-run")
    assert "--gpus-per-node" not in cpu
    assert "DS_ACCELERATOR=cpu" in cpu
    own.write_text("partitoin: urgent\n")
    with pytest.raises(ConfigError, match="did you mean 'partition'"):
        submit("--nodes", "2")
    assert not (here / "a run").exists()


def asked(*arguments: str, cluster: dict | None = None) -> dict[str, str]:
    """Cores and memory that a job asks for, by sbatch's names; the cores of its ranks' step under `srun`."""
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster or {}))
    script = submit("--nodes", "1", "--cluster", "cluster.yaml", "--dry-run", *arguments)
    options = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH --")]
    found = dict(option.removeprefix("--").split("=") for option in options if re.match("--(mem|cpus)", option))
    steps = set(re.findall(r"run_step .*--cpus-per-task=(\d+)", script))
    return found | ({"srun": steps.pop()} if steps else {})


def test_cores_and_memory_of_ranks_with_gpus(here: Path) -> None:
    """By SLURM's defaults a rank and its data workers would share a core, and memory may be a few GB per core."""
    gpus = ("--gpus-per-node", "8")
    cores = {"cpus-per-task": "6", "srun": "6"}
    assert asked(*gpus, "data.num_workers=4") == cores | {"mem": "0"}
    assert asked(*gpus, cluster={"cpus_per_rank": 12}) == {"cpus-per-task": "12", "srun": "12", "mem": "0"}
    assert asked(*gpus, "data.num_workers=4", cluster={"mem": "500G"}) == cores | {"mem": "500G"}
    assert asked(*gpus, "data.num_workers=4", cluster={"mem": "partition"}) == cores
    # SLURM refuses two of --mem, --mem-per-cpu and --mem-per-gpu
    for name in ("mem", "mem-per-cpu", "mem-per-gpu"):
        assert asked(*gpus, "data.num_workers=4", "--sbatch", f"--{name}=100G") == cores | {name: "100G"}
    bound = asked(*gpus, "data.num_workers=4", "--sbatch", "--mem-bind=local")
    assert bound == cores | {"mem": "0", "mem-bind": "local"}


def test_ranks_on_cpus_take_what_the_cluster_gives(here: Path) -> None:
    """A trial must not take a shared node."""
    assert asked("--ranks-per-node", "2") == {}
    assert asked("--ranks-per-node", "2", cluster={"cpus_per_rank": 1}) == {"cpus-per-task": "1", "srun": "1"}
    assert asked("--ranks-per-node", "2", cluster={"mem": "4G"}) == {"mem": "4G"}


def test_the_log_shows_the_variables_that_change_a_run(here: Path) -> None:
    script = submit("--nodes", "1", "--gpus-per-node", "1", "--dry-run")
    (line,) = [line for line in script.splitlines() if line.startswith("env |")]
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG", "OMP_NUM_THREADS", "HF_TOKEN", "HOME")
    shown = subprocess.run(
        ["bash", "-c", line], env=dict.fromkeys(names, "1"), capture_output=True, text=True, check=True
    )
    assert [each.split("=")[0] for each in shown.stdout.split()] == sorted(names[:4])


@pytest.mark.parametrize(
    "options",
    [
        ["--ranks-per-node", "2"],
        ["--cluster", "example"],
        ["--cluster", "example", "--container-image", "/images/a b.sqsh", "--sbatch", "--qos=long"],
    ],
)
def test_the_script_is_valid_bash(here: Path, options: list[str]) -> None:
    script = submit("--nodes", "1", "--dry-run", *options)
    assert len(script.splitlines()) < 80
    assert "@@" not in script
    (here / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", "job.sh"], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n passed")
    found = subprocess.run(["shellcheck", "job.sh"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_memory_is_checked_if_the_gpu_is_known(here: Path) -> None:
    """The refusals and their messages: tests/unit/launch/planner/test_planner.py."""
    note = "memory        not checked"
    assert note in submit("--nodes", "1", "--gpus-per-node", "1")
    assert note not in submit("--nodes", "1", "--ranks-per-node", "1")
    with pytest.raises(ConfigError, match=r"unknown GPU \(--gpu h100\)"):
        submit("--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100")


def test_percent_signs_of_a_path_are_doubled_for_sbatch(here: Path) -> None:
    """sbatch replaces %s, %j, ... in --output; its folder would not exist, and the job would end without a log."""
    script = submit(
        "--nodes", "2", "--ranks-per-node", "1", "--dry-run", "train.global_batch_size=2", "run.dir=half 50%s"
    )
    assert f"#SBATCH --output='{here}/half 50%%s/jobs/N/log'" in script
