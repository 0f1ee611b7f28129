"""`mirage-launch`: starts runs, on this machine or on a SLURM cluster, and says beforehand what they need."""

import typer

from launch import doctor
from mirage_ds import errors

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("doctor")(doctor.command)


@app.callback()
def launch() -> None:
    """Starts runs of mirage_ds."""


def main() -> None:
    errors.run(app)
