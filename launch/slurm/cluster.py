"""What a SLURM cluster wants of every job, from a YAML file; and the few questions put to SLURM's own commands.

~/.config/mirage/cluster.yaml     read when no --cluster is given, if it is there
launch/clusters/NAME.yaml         read for --cluster NAME; --cluster may also be the path of a file
"""

import subprocess
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from mirage_ds.errors import ConfigError
from mirage_ds.recipe import hint

CLUSTERS = Path(__file__).parents[1] / "clusters"


class Cluster(BaseModel):
    """What a job asks for; each value may be replaced on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    """Unset: the cluster's default partition."""
    account: str | None = None
    time: str | None = None
    """Time limit as SLURM writes it, for example 24:00:00; unset: the partition's."""
    gpus_per_node: PositiveInt | None = None
    """GPUs, and ranks, of each node."""
    ranks_per_node: PositiveInt | None = None
    """Instead of `gpus_per_node` where there are no GPUs: the ranks compute on the CPU."""
    gpu: str | None = None
    """Which GPU, as in launch/gpus.py: a recipe that does not fit on it is refused. Unset: not checked."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores of each rank; unset: what the cluster gives a task, and one thread."""
    container_image: str | None = None
    """Ranks run in this image (pyxis), with its `python`, where mirage_ds must be installed. The batch script runs
    outside of it, with the Python that submitted the job."""
    container_mounts: str | None = None
    """What the container sees, as pyxis writes it: /data:/data,/home:/home. The run's folder must be in it, and the
    one in which the job is submitted."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, for example --qos=long."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the ranks start, for example module load cuda."""
    environment: dict[str, str] = {}
    """Variables of the ranks, for example NCCL_SOCKET_IFNAME."""
    local_disk: Path = Path("/tmp")
    """A folder on each node's own disk; compiled kernels are cached there."""

    @model_validator(mode="after")
    def _ranks_are_set_once(self) -> "Cluster":
        if self.gpus_per_node is not None and self.ranks_per_node is not None:
            raise ValueError(
                "gpus_per_node and ranks_per_node are both set; on GPUs each rank has one; set one of them"
            )
        return self


def load_cluster(name: str | None) -> Cluster:
    """The cluster's settings: those of `name`, else the user's own file, else none.

    Raises:
        ConfigError: there is no such file, or it is wrong.
    """
    own = Path(typer.get_app_dir("mirage")) / "cluster.yaml"
    if name is None:
        return _read(own) if own.exists() else Cluster()
    path = CLUSTERS / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        known = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
        raise ConfigError(
            f"there is no such cluster (--cluster {name}); allowed are {', '.join(known)} and the path of a file like "
            f"{CLUSTERS / 'example.yaml'}; correct the name, or write {own}, which needs no --cluster"
        )
    return _read(path)


def _read(path: Path) -> Cluster:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the cluster file cannot be read ({path}): {error}; allowed is YAML; mend it, see clusters/example.yaml"
        ) from error
    return check(tree if tree is not None else {}, str(path))


def check(tree: Any, where: str) -> Cluster:
    """Settings as a `Cluster`.

    Raises:
        ConfigError: each key or value that is wrong.
    """
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        problems = []
        for details in error.errors():
            key = ".".join(str(part) for part in details["loc"])
            unknown = details["type"] == "extra_forbidden"
            what = f"unknown; {hint(key, Cluster.model_fields)}" if unknown else details["msg"]
            problems.append(f"  - {key}: {what}".replace("- : Value error, ", "- "))
        raise ConfigError(
            f"the cluster's settings are wrong ({where} and the command line):\n" + "\n".join(problems) + "\n"
            "correct each there, or give the option on the command line"
        ) from error


def ask(*command: str, environment: dict[str, str] | None = None) -> str:
    """The output of one of SLURM's commands, run with `environment` instead of this process's.

    Raises:
        ConfigError: it is not here, or it refused; with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not on this machine (in PATH); jobs are submitted where SLURM's commands are; log in "
            "there, or look at the job with --dry-run"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"SLURM refused ({' '.join(command)}): {error.stderr.strip()}; change what it names, with an option of "
            "this command or in the cluster file"
        ) from error
    return done.stdout


def check_partition(name: str | None, nodes: int) -> None:
    """Refuses a partition that is not there, or that has fewer nodes than the job wants.

    Raises:
        ConfigError: with the partitions that there are.
    """
    sizes: dict[str, int] = {}
    default = None
    for line in ask("sinfo", "--noheader", "--format=%P|%D").split():
        found, size = line.split("|")
        if found.endswith("*"):
            default = found = found.removesuffix("*")
        sizes[found] = sizes.get(found, 0) + int(size)
    there = ", ".join(f"{partition} ({size} nodes)" for partition, size in sizes.items())
    name = name or default
    if name is None:
        raise ConfigError(f"no partition is set, and the cluster has no default; allowed are {there}; set --partition")
    wanted = name.split(",")  # SLURM takes the first of several that is free
    missing = [partition for partition in wanted if partition not in sizes]
    if missing:
        raise ConfigError(f"there is no such partition (--partition {name}); allowed are {there}; set --partition")
    largest = max(sizes[partition] for partition in wanted)
    if nodes > largest:
        raise ConfigError(
            f"the job wants {nodes} nodes (--nodes {nodes}), and partition {name} has {largest}; allowed is up to that "
            f"number; there are {there}; set --nodes or --partition"
        )
