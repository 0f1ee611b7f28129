"""What the batch scripts of runs and of evaluations have in common: options, the step, the environment, the code."""

import os
import re
import shlex
import shutil
import string
import sys
from pathlib import Path

import ds_configs
import launch
import mirage_ds
from launch.slurm.cluster import Cluster, run_slurm
from mirage_ds.errors import ConfigError
from mirage_ds.programs import without_current_folder
from mirage_ds.versions import versions

PACKAGES = (mirage_ds, launch, ds_configs)


class Script(string.Template):
    """A template with the delimiter @@, as Bash uses $ and @."""

    delimiter = "@@"


def ranks_per_node_of(cluster: Cluster) -> int:
    """Ranks per node, with or without GPUs."""
    return cluster.gpus_per_node or cluster.ranks_per_node or 0


def memory_of_a_node(cluster: Cluster) -> str | None:
    """sbatch's --mem; None: what the partition gives.

    By default a node with GPUs gives all it has: rank 0 reads the complete model, a resume reads every rank's states.
    """
    if cluster.mem is not None:
        return None if cluster.mem == "partition" else cluster.mem
    is_set = any(re.match(r"--mem(-per-[cg]pu)?([=\s]|$)", option) for option in cluster.sbatch)  # not --mem-bind
    return "0" if cluster.gpus_per_node and not is_set else None


def header(cluster: Cluster, nodes: int, name: str, log: Path, cores: int | None) -> str:
    """The #SBATCH lines.

    Args:
        cores: CPU cores per rank; None: what the cluster gives.
    """
    options = {
        "job-name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "nodes": nodes,
        "ntasks-per-node": ranks_per_node_of(cluster),
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cores,
        "mem": memory_of_a_node(cluster),
        "chdir": Path.cwd(),
        "output": str(log).replace("%", "%%"),  # sbatch replaces %j, %s, ...
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return "\n".join(f"#SBATCH {line}" for line in (*lines, *cluster.sbatch))


def of_every_step(cluster: Cluster, cores: int | None) -> dict[str, str]:
    """What the templates need to start ranks: `commit`, `python`, `environment`, and `step`: options and program."""
    step = ""
    if cores:
        step += f"--cpus-per-task={cores} "  # srun no longer inherits it from sbatch
    if cluster.container_image:
        step += f"--container-image={shlex.quote(cluster.container_image)} "
        step += f"--container-workdir={shlex.quote(str(Path.cwd()))} "  # the user's paths may be relative
    if cluster.container_mounts:
        step += f"--container-mounts={shlex.quote(cluster.container_mounts)} "
    variables = dict(cluster.environment)
    if cluster.ranks_per_node:
        variables["DS_ACCELERATOR"] = "cpu"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return {
        "commit": versions()["git_commit"],
        "python": shlex.quote(sys.executable),
        "environment": "\n".join([*cluster.setup, *exports]),
        "step": step + ("python " if cluster.container_image else '"$python" '),
    }


def check_not_queued(jobs: Path, problem: str, remedy: str) -> None:
    """Refuses a second job that would write to the same place.

    Args:
        jobs: the folder of its jobs, each with its script.
        problem, remedy: for the message.

    Raises:
        ConfigError: a job of this folder is queued or running.
    """
    for line in run_slurm("squeue", "--me", "--noheader", "--format=%i|%T|%o").splitlines():
        number, state, script = (*line.split("|", 2), "", "")[:3]
        if Path(script).resolve().is_relative_to(jobs.resolve()):
            raise ConfigError(
                f"{problem}: {number} is {state}; allowed: one job at a time; wait for it, stop it with scancel "
                f"{number}, or {remedy}"
            )


def new_job(jobs: Path) -> Path:
    """Makes JOBS/N, with the next number."""
    jobs.mkdir(parents=True, exist_ok=True)
    folder = jobs / str(1 + max((int(path.name) for path in jobs.iterdir() if path.name.isdecimal()), default=0))
    folder.mkdir()
    return folder


def copy_code(folder: Path) -> None:
    """Copies the packages to FOLDER/code, so that a later start of the job runs what was submitted."""
    for package in PACKAGES:
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, folder / "code" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "code" / "commit").write_text(versions()["git_commit"] + "\n")


def submission_environment(cluster: Cluster) -> dict[str, str]:
    """The variables of this process, without those that would override the script's options, and without those of an
    enclosing job: the new ranks would follow them, for example all run on the one core of that job's step."""
    overriding = {
        "SBATCH_ACCOUNT": cluster.account,
        "SBATCH_PARTITION": cluster.partition,
        "SBATCH_TIMELIMIT": cluster.time,
        "SBATCH_GPUS_PER_NODE": cluster.gpus_per_node,
        "SBATCH_MEM_PER_NODE": cluster.mem,
    }
    removed = {name for name, value in overriding.items() if value is not None} | {
        *("SBATCH_ARRAY_INX", "SBATCH_ERROR", "SBATCH_EXPORT", "SBATCH_NO_KILL", "SBATCH_NO_REQUEUE"),
        *("SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_SIGNAL", "SBATCH_WAIT", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    }
    return without_current_folder(
        {
            name: value
            for name, value in os.environ.items()
            if name in ("SLURM_CONF", "SLURM_JWT") or not (name.startswith(("SLURM_", "SRUN_")) or name in removed)
        }
    )
