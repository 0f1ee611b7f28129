"""`mirage-launch`: starts runs and evaluations, here or on a SLURM cluster; plans runs, and checks what they need."""

import typer

from launch.doctor import command as doctor
from launch.evaluate import evaluate
from launch.local import local
from launch.planner import plan
from launch.slurm import shard_jobs
from launch.slurm.submit import slurm
from mirage_ds import errors, library_noise

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def launch() -> None:
    """Starts runs and evaluations of mirage_ds."""


app.command("local")(local)
app.command("slurm")(slurm)
app.command("evaluate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(evaluate)
app.command("build-shards")(shard_jobs.command)
app.command("plan")(plan.command)
app.command("doctor")(doctor.command)


def main() -> None:
    library_noise.silence()
    errors.run(app)
