"""`mirage-launch build-shards`: builds shards in a job array and merges them in a job that depends on it.

OUTPUT.jobs/build.sh, merge.sh     the two batch scripts
OUTPUT.jobs/build-I.log            output of task I
OUTPUT.jobs/merge.log              output of the merge job
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.parts import check_no_other_parts, describe_part, rows_of
from launch.slurm.cluster import Cluster, check_partition, load_cluster, parse_settings, run_slurm
from launch.slurm.script import Script, submission_environment
from mirage_ds.errors import DataError, name_full_disk, name_unwritable
from mirage_ds.paths import expanded

HERE = Path(__file__).parent


@expanded("cluster")
def command(
    rows: Annotated[Path, typer.Argument(help="JSONL rows; image paths are relative to this file.")],
    output: Annotated[Path, typer.Argument(help="New folder for shards, manifest and index.")],
    *,
    tasks: Annotated[int, typer.Option(min=1, help="Number of array tasks; each builds one part.")],
    maxcount: Annotated[int, typer.Option(min=1, help="Maximum samples per shard.")] = 10_000,
    maxsize: Annotated[int, typer.Option(min=1, help="Bytes after which a new shard starts.")] = 1_000_000_000,
    max_rejects: Annotated[int, typer.Option(min=0, help="Unusable rows to tolerate, in all parts together.")] = 0,
    time: Annotated[str | None, typer.Option(help="Time limit of each job.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition; no GPU is needed.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account to charge.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help='Additional sbatch option: --sbatch "--qos=long".')] = None,
    cluster: Annotated[str | None, typer.Option(help="Settings: a name in launch/clusters/, or a file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; submit and write nothing.")] = False,
) -> None:
    """Builds shards in a job array: the same shards as one process of `mirage-data build`."""
    given = {"time": time, "partition": partition, "account": account}
    settings = load_cluster(cluster)
    tree = settings.model_dump(exclude_unset=True) | {name: value for name, value in given.items() if value is not None}
    settings = parse_settings(tree | {"sbatch": (*settings.sbatch, *(sbatch or []))}, "the cluster file")
    rows, output = rows.absolute(), output.absolute()
    rows_of([rows], 0, tasks, maxcount)  # refuses more tasks than there are shards
    if output.exists():
        raise DataError(f"the output already exists ({output}); allowed: a new folder; choose another or remove it")
    check_no_other_parts(output, describe_part([rows], 0, tasks, maxcount, maxsize))
    jobs = output.parent / f"{output.name}.jobs"
    limits = ["--maxcount", str(maxcount), "--maxsize", str(maxsize), "--max-rejects", str(max_rejects)]
    logs = str(jobs).replace("%", "%%")  # sbatch replaces %j, %s, ...
    build = render("build_shards.sh", rows, output, settings, tasks, f"{logs}/build-%a.log", limits=shlex.join(limits))
    merge = render("merge_shards.sh", rows, output, settings, tasks, f"{logs}/merge.log", max_rejects=str(max_rejects))
    if dry_run:
        print(f"{build}\n{merge}", end="")
        return
    check_partition(settings.partition, 1)
    remedy = "choose an output folder that you may write and that every node sees"
    with name_full_disk(jobs, "free some space, or write to another disk"), name_unwritable(jobs, remedy):
        jobs.mkdir(parents=True, exist_ok=True)
        (jobs / "build.sh").write_text(build)
        (jobs / "merge.sh").write_text(merge)
    array = submit(jobs / "build.sh", settings)
    # If a task fails, the merge job cannot start; without the second option it would stay in the queue forever.
    last = submit(jobs / "merge.sh", settings, f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    print(
        f"submitted     array {array} (tasks: {tasks}), and job {last}, which merges when all tasks have succeeded\n"
        f"scripts       {jobs / 'build.sh'}, {jobs / 'merge.sh'}\n"
        f"logs          tail -F {jobs}/*.log\n"
        f"status        squeue --jobs {array},{last}\n"
        f"stop          scancel {array} {last}\n"
        f"on success    {jobs / 'merge.log'} ends with a summary; then run: mirage-data check {output}\n"
        f"on failure    see the logs; the same command builds the missing parts"
    )


def submit(script: Path, cluster: Cluster, *options: str) -> str:
    """Submits a script; returns the job id."""
    command = ["sbatch", "--parsable", *options, str(script)]
    return run_slurm(*command, environment=submission_environment(cluster)).split(";")[0].strip()


def render(template: str, rows: Path, output: Path, cluster: Cluster, tasks: int, log: str, **more: str) -> str:
    """A batch script. Each task has one core and one worker: more of them make more of the work at a time."""
    options = {
        "job-name": output.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": 1,
        "output": log,
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    program = shlex.quote(str(Path(sys.executable).parent / "mirage-data"))
    if cluster.container_image:
        mounts = [f"--container-mounts={cluster.container_mounts}"] if cluster.container_mounts else []
        program = shlex.join(["srun", f"--container-image={cluster.container_image}", *mounts, "mirage-data"])
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return Script((HERE / template).read_text()).substitute(
        rows=rows,
        rows_quoted=shlex.quote(str(rows)),
        output=shlex.quote(str(output)),
        options="\n".join(f"#SBATCH {line}" for line in (*lines, *cluster.sbatch)),
        environment="\n".join([*cluster.setup, *exports]),
        last=tasks - 1,
        tasks=tasks,
        tasks_padded=f"{tasks:05d}",
        command=program,
        **more,
    )
