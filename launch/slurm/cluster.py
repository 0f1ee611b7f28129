"""Settings of a SLURM cluster, from a YAML file; runs SLURM's own commands.

~/.config/mirage/cluster.yaml     read without --cluster, if it exists
launch/clusters/NAME.yaml         read for --cluster NAME; --cluster may also be the path of a file
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import typer
from pydantic import Field, ValidationError, model_validator

from mirage_ds import strict_yaml
from mirage_ds.config_values import Listed, PositiveInt, Section, UserName, UserPath
from mirage_ds.errors import ConfigError
from mirage_ds.programs import ask
from mirage_ds.recipe import hint

CLUSTERS = Path(__file__).parents[1] / "clusters"


class Cluster(Section):
    """Settings of every job; options on the command line override them."""

    partition: str | None = None
    """Unset: the cluster's default partition."""
    account: str | None = None
    time: str | None = None
    """Time limit in SLURM's format, for example 24:00:00; unset: the partition's."""
    gpus_per_node: PositiveInt | None = None
    """GPUs per node; one rank each."""
    ranks_per_node: PositiveInt | None = None
    """Ranks per node on the CPU, instead of `gpus_per_node`."""
    gpu: str | None = None
    """GPU type from mirage_ds/sizing/gpus.py; recipes that do not fit in its memory are refused. Unset: not checked."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores per rank. Unset: with GPUs 2 more than data.num_workers; else the cluster's default per task, and one
    thread."""
    mem: str | None = None
    """Memory of each node as sbatch's --mem takes it, for example 500G; `partition`: what the partition gives. Unset:
    with GPUs all memory of the node (0), unless `sbatch` has an option for it; else what the partition gives."""
    container_image: UserName | None = None
    """Image in which the ranks run (pyxis), with its `python`; mirage_ds must be installed there. The batch script runs
    outside the container, with the Python that submitted the job."""
    container_mounts: str | None = None
    """Mounts of the container in pyxis's format: /data:/data,/home:/home. They must include the run's folder and the
    folder in which the job is submitted."""
    sbatch: Listed[str] = ()
    """Additional sbatch options, for example --qos=long."""
    setup: Listed[str] = ()
    """Bash lines to run before the ranks start, for example module load cuda."""
    environment: dict[str, str] = Field(default={})
    """Environment variables of the ranks, for example NCCL_SOCKET_IFNAME."""
    local_disk: UserPath = Path("/tmp")
    """A folder on the local disk of each node, for the cache of compiled kernels."""

    @property
    def mem_bytes(self) -> float | None:
        """Host memory of a node; None: all that the node or the partition has, which is not known here."""
        number = re.fullmatch(r"(\d+)([KMGT]?)B?", self.mem or "", re.IGNORECASE)
        if number is None or not int(number[1]):
            return None
        return int(number[1]) * 2.0 ** {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[number[2].upper()]

    @model_validator(mode="after")
    def _ranks_are_set_once(self) -> "Cluster":
        if self.gpus_per_node is not None and self.ranks_per_node is not None:
            raise ValueError(
                "gpus_per_node and ranks_per_node are both set; with GPUs, each rank has one; set only one of them"
            )
        return self


def load_cluster(name: str | None) -> Cluster:
    """Settings from the file of `name`; without a name from the user's file, if it exists.

    Raises:
        ConfigError: there is no such file, or it is invalid.
    """
    user_file = Path(typer.get_app_dir("mirage")) / "cluster.yaml"
    if name is None:
        return _read(user_file) if user_file.exists() else Cluster()
    path = CLUSTERS / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        known = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
        raise ConfigError(
            f"no such cluster (--cluster {name}); allowed: {', '.join(known)}, or the path of a file like "
            f"{CLUSTERS / 'example.yaml'}; correct the name, or write {user_file}, which is read without --cluster"
        )
    return _read(path)


def _read(path: Path) -> Cluster:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the cluster file cannot be read ({path}): {error}; allowed: YAML as in clusters/example.yaml; fix it"
        ) from error
    tree = strict_yaml.load(text, "the cluster file", str(path))
    if isinstance(tree, dict):  # a key without a value has its default
        tree = {name: value for name, value in tree.items() if value is not None}
    return parse_settings({} if tree is None else tree, str(path))


def parse_settings(tree: Any, where: str) -> Cluster:
    """Validates settings.

    Raises:
        ConfigError: some are invalid; the message lists all of these.
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
            f"invalid cluster settings ({where} and the command line):\n" + "\n".join(problems) + "\n"
            "correct each there, or set the option on the command line"
        ) from error


def run_slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """Runs one of SLURM's commands, in `environment` (default: a plain one); returns its stdout.

    Raises:
        ConfigError: the command is not installed or failed; the message has its stderr.
    """
    try:
        done = ask(*command, environment=environment)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not installed (on this machine, in PATH); submitting a job needs SLURM's commands; log "
            "in to a machine that has them, or print the script with --dry-run"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"SLURM rejected the command ({' '.join(command)}): {error.stderr.strip()}; change the option that it "
            "names, on the command line or in the cluster file"
        ) from error
    return done.stdout


def check_partition(name: str | None, nodes: int) -> None:
    """Refuses a partition that does not exist, or that has fewer nodes than the job needs.

    Raises:
        ConfigError: the message lists the partitions.
    """
    sizes: dict[str, int] = {}
    default = None
    for line in run_slurm("sinfo", "--noheader", "--format=%P|%D").split():
        found, separator, size = line.partition("|")
        if not separator:  # of the line `CLUSTER: name`, with SLURM_CLUSTERS set
            continue
        if found.endswith("*"):
            default = found = found.removesuffix("*")
        sizes[found] = sizes.get(found, 0) + int(size)
    allowed = ", ".join(f"{partition} ({size} {'node' if size == 1 else 'nodes'})" for partition, size in sizes.items())
    name = name or default
    if name is None:
        raise ConfigError(f"no partition is set, and the cluster has no default; allowed: {allowed}; set --partition")
    wanted = name.split(",")  # of several partitions, SLURM uses the first that is free
    missing = [partition for partition in wanted if partition not in sizes]
    if missing:
        raise ConfigError(f"no such partition (--partition {name}); allowed: {allowed}; set --partition")
    largest = max(sizes[partition] for partition in wanted)
    if nodes > largest:
        raise ConfigError(
            f"the partition has too few nodes (--nodes {nodes}, partition {name} with {largest}); allowed: {allowed}; "
            "set --nodes or --partition"
        )
