"""The `mirage-data` command: `mirage-data build --input rows.jsonl --output SHARDS`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.build import build as build_shards
from mirage_ds.errors import MirageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Prepares data for mirage_ds, offline."""


@app.command()
def build(
    rows: Annotated[Path, typer.Option("--input", help="JSONL rows; image paths are relative to this file.")],
    output: Annotated[Path, typer.Option(help="New folder for shards, manifest and index.")],
    maxcount: Annotated[int, typer.Option(min=1, help="Samples per shard at most.")] = 10_000,
    maxsize: Annotated[int, typer.Option(min=1, help="Bytes after which a new shard begins.")] = 1_000_000_000,
) -> None:
    """Turns rows and images into tar shards that plain webdataset reads."""
    with Console(stderr=True).status("building shards"):
        manifest = build_shards(rows, output, maxcount=maxcount, maxsize=maxsize)
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    typer.echo(f"wrote {manifest.num_samples} samples in {len(manifest.shards)} shards, {num_bytes} bytes, to {output}")


def main() -> None:
    """A user's mistake is one message and exit code 2; a bug keeps its traceback."""
    try:
        app()
    except MirageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
