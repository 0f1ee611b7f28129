"""`mirage-launch evaluate`: `mirage evaluate` on all GPUs of this machine, or as a job of SLURM.

FILE.jobs/N/job.sh    the batch script; FILE is --output
FILE.jobs/N/code/     a copy of the packages at submission
FILE.jobs/N/log       output of all starts of the job
"""

import shlex
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

from launch.local import Launch, number_of_ranks
from launch.slurm.cluster import Cluster, check_partition, load_cluster, run_slurm
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
from launch.slurm.submit import apply_options
from mirage_ds import cli
from mirage_ds.errors import ConfigError, name_full_disk, name_unwritable
from mirage_ds.evaluation.results import parts_of
from mirage_ds.paths import expand, expanded

TEMPLATE = Path(__file__).parent / "slurm" / "evaluate.sh"
CORES_OF_A_GPU = 2  # one reads and encodes the next questions' images, one is for background threads


@expanded("cluster", "container_image")
def evaluate(
    context: typer.Context,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, show_default="one per GPU; 1 without a GPU", help="Processes.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Submit a job with so many nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs per node; one rank each.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks per node without GPUs.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit; the job is requeued before it, and continues.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account to charge.")] = None,
    container_image: Annotated[str | None, typer.Option(help="Container image of the ranks (pyxis).")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help='Additional sbatch option: --sbatch "--qos=long".')] = None,
    cluster: Annotated[str | None, typer.Option(help="Settings: a name in launch/clusters/, or a file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
) -> None:
    """Runs `mirage evaluate` with several ranks, each with the whole model. All its options are options here too.

    The same command continues an evaluation that was ended.
    """
    options = {
        "time": time,
        "partition": partition,
        "account": account,
        "container_image": container_image,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
    }
    given: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    if nodes is None and (given or sbatch or cluster or dry_run):
        raise ConfigError(
            "options of a job without --nodes (on the command line); a job needs its number of nodes, an evaluation on "
            "this machine takes --ranks alone; add --nodes, or remove them"
        )
    if nodes is not None and ranks is not None:
        raise ConfigError(
            "--ranks and --nodes are both set (on the command line); expected --ranks on this machine, or --nodes with "
            "--gpus-per-node or --ranks-per-node for a job; remove one"
        )
    output = check_options(context.args)
    if nodes is None:
        command = [sys.executable, "-u", "-m", "mirage_ds.cli", "evaluate", *context.args]
        launched = Launch(command, number_of_ranks(ranks), on_interrupt="ending; the same command continues")
        sys.exit(launched.wait())
    submit(context.args, output, apply_options(load_cluster(cluster), given, sbatch), nodes, dry_run=dry_run)


def check_options(arguments: list[str]) -> Path:
    """Parses and checks options of `mirage evaluate` as the command itself does; returns its --output.

    Raises:
        click.UsageError, MirageError: as the command does.
    """
    command = typer.main.get_group(cli.app).commands["evaluate"]
    with command.make_context("mirage evaluate", ["--check", *arguments]) as context:
        with redirect_stdout(StringIO()):  # what is there to do is said by the ranks
            command.invoke(context)
        return Path(expand(str(context.params["output"]))).absolute()


def submit(arguments: list[str], output: Path, cluster: Cluster, nodes: int, *, dry_run: bool) -> None:
    """Submits the job, or prints its script."""
    jobs = Path(f"{output}.jobs")
    if dry_run:
        print(render(arguments, output, cluster, nodes, jobs / "N"), end="")
        return
    check_partition(cluster.partition, nodes)
    check_not_queued(jobs, f"the evaluation already has a job (--output {output})", "name another --output")
    remedy = "name an --output that you may write and that every node sees"
    with name_full_disk(jobs, "free some space, or name another --output"), name_unwritable(jobs, remedy):
        folder = new_job(jobs)
        copy_code(folder)
        script = folder / "job.sh"
        script.write_text(render(arguments, output, cluster, nodes, folder))
    try:
        answer = run_slurm("sbatch", "--parsable", str(script), environment=submission_environment(cluster))
    except ConfigError:
        shutil.rmtree(folder)  # no job uses it
        raise
    number = answer.split(";")[0].strip()
    print(
        f"submitted     job {number} (nodes: {nodes}, ranks per node: {ranks_per_node_of(cluster)})\n"
        f"script        {script}\n"
        f"log           tail -F {folder / 'log'}\n"
        f"status        squeue --job {number}\n"
        f"stop          scancel {number}     (what is answered is kept)\n"
        f"results       {output}\n"
        f"continue      {shlex.join(['mirage-launch', *sys.argv[1:]])}"
    )


def render(arguments: list[str], output: Path, cluster: Cluster, nodes: int, job: Path) -> str:
    """The batch script."""
    cores = cluster.cpus_per_rank or (CORES_OF_A_GPU if cluster.gpus_per_node else None)
    return Script(TEMPLATE.read_text()).substitute(
        options=header(cluster, nodes, output.name, job / "log", cores),
        job=shlex.quote(str(job)),
        parts=shlex.quote(str(parts_of(output))),
        arguments=shlex.join(arguments),
        **of_every_step(cluster, cores),
    )
