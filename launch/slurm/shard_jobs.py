"""`mirage-launch build-shards`: the shards of many rows, built by a job array and merged by a job that waits for it.

OUTPUT.jobs/build.sh, merge.sh     the two batch scripts
OUTPUT.jobs/build-I.log            what task I prints
OUTPUT.jobs/merge.log
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_tools.parts import check_no_other_parts, describe_part, rows_of
from launch.slurm.cluster import Cluster, ask, check, check_partition, load_cluster
from launch.slurm.submit import Script
from mirage_ds.errors import DataError, name_full_disk, name_unwritable

HERE = Path(__file__).parent


def command(
    rows: Annotated[Path, typer.Argument(help="JSONL rows; image paths are relative to this file.")],
    output: Annotated[Path, typer.Argument(help="New folder for shards, manifest and index.")],
    *,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the array; each builds one part.")],
    maxcount: Annotated[int, typer.Option(min=1, help="Samples per shard at most.")] = 10_000,
    maxsize: Annotated[int, typer.Option(min=1, help="Bytes after which a new shard begins.")] = 1_000_000_000,
    max_rejects: Annotated[int, typer.Option(min=0, help="Rows that may be left out, in all parts together.")] = 0,
    time: Annotated[str | None, typer.Option(help="Time limit of each job.")] = None,
    partition: Annotated[str | None, typer.Option(help="Where the jobs run; no GPU is needed.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help='A further option of sbatch: --sbatch "--qos=long".')] = None,
    cluster: Annotated[str | None, typer.Option(help="Defaults: a name in launch/clusters/, or a file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; ask SLURM and write nothing.")] = False,
) -> None:
    """Builds shards with a job array, as `mirage-data build` would with one process."""
    given = {"time": time, "partition": partition, "account": account}
    settings = load_cluster(cluster)
    tree = settings.model_dump(exclude_unset=True) | {name: value for name, value in given.items() if value is not None}
    settings = check(tree | {"sbatch": (*settings.sbatch, *(sbatch or []))}, "the cluster file")
    rows, output = rows.absolute(), output.absolute()
    rows_of(rows, 0, tasks, maxcount)  # refuses more tasks than there are shards
    if output.exists():
        raise DataError(f"the output is there already ({output}); allowed is a new folder; name another or remove it")
    check_no_other_parts(output, describe_part(rows, 0, tasks, maxcount, maxsize))
    jobs = output.parent / f"{output.name}.jobs"
    limits = ["--maxcount", str(maxcount), "--maxsize", str(maxsize), "--max-rejects", str(max_rejects)]
    build = render("build_shards.sh", rows, output, settings, tasks, jobs / "build-%a.log", limits=shlex.join(limits))
    merge = render("merge_shards.sh", rows, output, settings, tasks, jobs / "merge.log", max_rejects=str(max_rejects))
    if dry_run:
        print(f"{build}\n{merge}", end="")
        return
    check_partition(settings.partition, 1)
    remedy = "name an output that you may write and that every node sees"
    with name_full_disk(jobs, "free some space, or write to another disk"), name_unwritable(jobs, remedy):
        jobs.mkdir(parents=True, exist_ok=True)
        (jobs / "build.sh").write_text(build)
        (jobs / "merge.sh").write_text(merge)
    array = submit(jobs / "build.sh")
    # A task that failed means no merging: without the second option that job would wait for ever.
    last = submit(jobs / "merge.sh", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    print(
        f"submitted     array {array}, {tasks} tasks, and job {last}, which merges once all have ended well\n"
        f"scripts       {jobs / 'build.sh'}, {jobs / 'merge.sh'}\n"
        f"logs          tail -F {jobs}/*.log\n"
        f"where it is   squeue --jobs {array},{last}\n"
        f"stop          scancel {array} {last}\n"
        f"it worked     {jobs / 'merge.log'} ends with what was written; then: mirage-data check {output}\n"
        f"it did not    the logs say why; the same command goes on with the parts that are missing"
    )


def submit(script: Path, *options: str) -> str:
    """SLURM's number of the job."""
    return ask("sbatch", "--parsable", *options, str(script)).split(";")[0].strip()


def render(template: str, rows: Path, output: Path, cluster: Cluster, tasks: int, log: Path, **more: str) -> str:
    """A batch script. One task on one core: a build reads, decodes and writes one sample at a time."""
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
