"""The command `mirage-data import`."""

from pathlib import Path
from typing import Annotated

import typer

from data_tools.building.progress import shown
from data_tools.importing.formats import AUTO, FORMATS
from data_tools.importing.options import DEFAULT_MARGIN, Options
from data_tools.importing.pictures import TINY_PX
from data_tools.importing.report import LEFT_OUT_NAME
from data_tools.importing.rows import import_rows
from mirage_ds.paths import expanded

app = typer.Typer()


@app.command("import")
@expanded("sources")
def import_(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(FORMATS)}, or {AUTO}.")],
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files with rows, or folders of them.")],
    output: Annotated[Path, typer.Option(help="New folder for rows.jsonl, images and report.json.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder where paths of images begin; else that of their file of rows.")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="Around each box, as a part of its width and of its height.")
    ] = DEFAULT_MARGIN,
    all_turns: Annotated[
        bool, typer.Option("--all-turns", help="A row for each answer of a chat, not for the last one alone.")
    ] = False,
) -> None:
    """Imports a published data set as rows for `build` or `mirage evaluate`; rows that cannot be used are listed."""
    options = Options(margin, all_turns)
    with shown("importing rows") as progress:
        imported = import_rows(format_name, sources, output, images=images, options=options, progress=progress)
    report, written = imported.report, imported.output
    if format_name == AUTO:
        typer.echo(f"the rows look like {imported.format.name}")
    typer.echo(
        f"wrote to {output}: rows: {written.num_rows}, images: {written.num_images}; {imported.format.name} rows that "
        f"were taken: {report.num_taken} of {report.num_read}"
    )
    if report.left_out:
        typer.echo(f"left out: {report.left_out.total()}: {report.reasons()}; see {output / LEFT_OUT_NAME}")
    if report.files_not_taken:
        typer.echo(f"files of which no row was taken, perhaps of another format: {', '.join(report.files_not_taken)}")
    if written.num_tiny_parts:
        typer.echo(f"parts of images with a side of less than {TINY_PX} pixels: {written.num_tiny_parts}")
    if report.ignored:
        ignored = ", ".join(f"{name}: {number}" for name, number in report.ignored.most_common())
        typer.echo(f"fields that were ignored, with their rows: {ignored}")
