"""`mirage compare`: its options, and what it prints. Needs no torch."""

from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.compare import changed_table, comparison_table, other_decoding, read_sides
from mirage_ds.evaluation.groups import check_groups
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.paths import expanded
from mirage_ds.wide_console import wide_console


@expanded()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Results files of `mirage evaluate`; the first is the base.")],
    by: Annotated[str | None, typer.Option(help="Field of the rows to group by.", show_default="the level")] = None,
    arm: Annotated[str, typer.Option(help="The arm of every file that is compared.")] = OWN,
    changed: Annotated[
        int, typer.Option(min=0, help="Rows to show whose score, or without scores whose text, changed.")
    ] = 10,
) -> None:
    """Compares finished results files over the same rows: paired differences to the first, and rows that changed."""
    if len(files) < 2:
        raise ConfigError(
            f"results files on the command line: {len(files)}; expected two or more; name another one to compare with"
        )
    sides = read_sides(files, arm)
    check_groups([answer.row for answer in sides[0].answers], by)
    for line in other_decoding(sides):
        typer.echo(line)
    for table in (comparison_table(sides, by), changed_table(sides, changed)):
        if table:
            wide_console().print(table)
