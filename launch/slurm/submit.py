"""`mirage-launch slurm`: submits a recipe as a job that saves before its time limit, is requeued, and resumes.

RUN/jobs/N/job.sh        the batch script
RUN/jobs/N/recipe.yaml   the resolved recipe
RUN/jobs/N/code/         a copy of the packages at submission
RUN/jobs/N/log           output of all starts of the job
"""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from launch.slurm.attempts import LOG_NAME, RECIPE_NAME
from launch.slurm.cluster import Cluster, check_partition, load_cluster, parse_settings, run_slurm
from launch.slurm.script import (
    Script,
    check_not_queued,
    copy_code,
    header,
    new_job,
    of_every_step,
    ranks_per_node_of,
    submission_environment,
)
from mirage_ds.config import Config
from mirage_ds.data.folders import load_folders
from mirage_ds.early_checks import check_inputs
from mirage_ds.errors import ConfigError, name_full_disk, name_unwritable
from mirage_ds.model_folder import is_cached
from mirage_ds.owner import refuse_living
from mirage_ds.paths import expanded
from mirage_ds.recipe import load_config
from mirage_ds.versions import versions

TEMPLATE = Path(__file__).parent / "job.sh"


@expanded("cluster", "container_image")
def slurm(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, for example one of launch/recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")],
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node; one rank each.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node without GPUs.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU type, for example h100-80gb: a recipe that does not fit is refused.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit; the run saves before it, and is requeued.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account to charge.")] = None,
    container_image: Annotated[str | None, typer.Option(help="Container image of the ranks (pyxis).")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help='Additional sbatch option: --sbatch "--qos=long".')] = None,
    cluster: Annotated[str | None, typer.Option(help="Settings: a name in launch/clusters/, or a file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
) -> None:
    """Submits a run that survives time limits, preemption and node failures. The same command resumes it."""
    given = {
        "time": time,
        "partition": partition,
        "account": account,
        "container_image": container_image,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "gpu": gpu,
    }
    settings = apply_options(
        load_cluster(cluster), {name: value for name, value in given.items() if value is not None}, sbatch
    )
    config = load_config(recipe, overrides)
    if config.run.resume == "never":  # every start of the job after the first one resumes
        config = load_config(recipe, [*(overrides or []), "run.resume=auto"])
    check_job(config, settings, nodes)
    if dry_run:
        print(render(recipe, config, settings, nodes, config.run.dir.absolute() / "jobs" / "N"), end="")
        return
    check_partition(settings.partition, nodes)
    check_not_queued(
        config.run.dir / "jobs", f"the run already has a job (run.dir={config.run.dir})", "set another run.dir"
    )
    refuse_living(config.run.dir)
    folder = write(recipe, config, settings, nodes)
    try:
        script = str(folder / "job.sh")
        answer = run_slurm("sbatch", "--parsable", script, environment=submission_environment(settings))
        number = answer.split(";")[0].strip()
    except ConfigError:
        shutil.rmtree(folder)  # no job uses it
        raise
    again = shlex.join(["mirage-launch", *sys.argv[1:]])
    print(
        f"submitted     job {number} (nodes: {nodes}, ranks per node: {ranks_per_node_of(settings)}), "
        f"code of {versions()['git_commit']}\n"
        f"script        {folder / 'job.sh'}\n"
        f"log           tail -F {folder / LOG_NAME}\n"
        f"attempts      {folder / 'attempts.jsonl'}\n"
        f"curves        tensorboard --logdir {config.run.dir / 'tensorboard'}\n"
        f"status        squeue --job {number}\n"
        f"stop          scancel {number}     (the run saves first, and is not restarted)\n"
        f"resume        {again}"
    )
    if settings.gpus_per_node and not settings.gpu:
        print("memory        not checked: unknown GPU type (set --gpu, or gpu in the cluster file)")


def apply_options(cluster: Cluster, given: dict[str, object], sbatch: list[str] | None) -> Cluster:
    """The cluster's settings, overridden by the command line.

    Raises:
        ConfigError: the ranks per node are set twice or not at all, or an sbatch option is invalid.
    """
    tree = cluster.model_dump(exclude_unset=True)
    if given.keys() & {"gpus_per_node", "ranks_per_node"}:
        tree = {name: value for name, value in tree.items() if name not in ("gpus_per_node", "ranks_per_node")}
    settings = parse_settings(tree | given | {"sbatch": (*cluster.sbatch, *(sbatch or []))}, "the cluster file")
    if settings.gpus_per_node is None and settings.ranks_per_node is None:
        raise ConfigError(
            "the ranks per node are not set (on the command line or in the cluster file); allowed: 1 or more; set "
            "--gpus-per-node, or --ranks-per-node without GPUs"
        )
    for option in settings.sbatch:
        if not option.startswith("-") or option.startswith(("-a", "--array")) or "\n" in option:
            raise ConfigError(
                f"invalid sbatch option (--sbatch {option!r:.80}); allowed: the options of sbatch --help except "
                "--array, which would start several jobs on one run; correct it, for example --qos=long"
            )
    return settings


def cores_of_a_rank(config: Config, cluster: Cluster) -> int | None:
    """CPU cores per rank; None: what the cluster gives.

    By default a rank with a GPU has one for itself, one for its background threads (NCCL, pinning), and one for each
    data worker. SLURM's own default is one for all of them.
    """
    return cluster.cpus_per_rank or (config.data.num_workers + 2 if cluster.gpus_per_node else None)


def check_job(config: Config, cluster: Cluster, nodes: int) -> None:
    """Refuses a job that would fail after hours in the queue; runs no SLURM command.

    Raises:
        ConfigError: the batch does not divide, the time limit is too short, or the run does not fit on the GPUs.
        DataError: an input of the run is missing on this machine, or a sample is longer than the run allows.
    """
    config.train.samples_per_rank(nodes * ranks_per_node_of(cluster))
    limit_s = seconds(cluster.time) if cluster.time else None
    if limit_s is not None and limit_s <= config.run.save_before_end_s:
        raise ConfigError(
            f"the time limit is {limit_s} s (--time {cluster.time}), but run.save_before_end_s="
            f"{config.run.save_before_end_s}: the run would save as soon as it starts; allowed: a longer limit; set "
            "--time or run.save_before_end_s"
        )
    check_inputs(config)
    model = config.model
    if not Path(model.path).is_dir() and not is_cached(model.path, model.cache_dir):
        print(
            f"warning: model.path={model.path} is neither a folder nor in the hub's cache on this machine; "
            "nodes without internet cannot load it",
            file=sys.stderr,
        )
    if config.data.max_length is not None or config.data.packing:
        # Imported here: torch and transformers take seconds to import.
        from mirage_ds.training.sample_costs import measure_folders
        from mirage_ds.training.start import open_encoder

        measure_folders(config, open_encoder(config), load_folders(config.data))
    if cluster.gpus_per_node and cluster.gpu:
        # Imported here: torch and transformers take seconds to import, and only this check needs them.
        from launch.planner.estimate import check_fits

        check_fits(config, nodes, cluster.gpus_per_node, cluster.gpu, cluster.mem_bytes)


def seconds(limit: str) -> int | None:
    """Seconds of a time limit in SLURM's formats: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: no limit.

    Raises:
        ConfigError: it has none of these formats.
    """
    if limit.lower() in ("infinite", "unlimited"):
        return None
    found = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", limit)
    if found is None:
        raise ConfigError(
            f"invalid time limit (--time {limit}); allowed: minutes, H:M:S, D-H and D-H:M:S; correct it, for example "
            "24:00:00"
        )
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"]:
        hours, minutes, rest = [*parts, 0, 0][:3]
    else:
        hours, minutes, rest = {1: [0, parts[0], 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def write(recipe: Path, config: Config, cluster: Cluster, nodes: int) -> Path:
    """Creates RUN/jobs/N with everything that the job needs; returns it."""
    jobs = config.run.dir.absolute() / "jobs"
    remedy = "set run.dir to a folder that you may write and that every node sees"
    with name_full_disk(jobs, "free some space, or set run.dir to another disk"), name_unwritable(jobs, remedy):
        folder = new_job(jobs)
        tree = config.model_dump(mode="json")
        (folder / RECIPE_NAME).write_text(yaml.safe_dump(tree, sort_keys=False))
        copy_code(folder)
        (folder / "job.sh").write_text(render(recipe, config, cluster, nodes, folder))
    return folder


def render(recipe: Path, config: Config, cluster: Cluster, nodes: int, job: Path) -> str:
    """The batch script."""
    cores = cores_of_a_rank(config, cluster)
    return Script(TEMPLATE.read_text()).substitute(
        recipe=recipe,
        options=header(cluster, nodes, config.run.dir.name, job / LOG_NAME, cores),
        warning=f"B:USR1@{config.run.save_before_end_s}",
        job=shlex.quote(str(job)),
        local_disk=shlex.quote(str(cluster.local_disk)),
        **of_every_step(cluster, cores),
    )
