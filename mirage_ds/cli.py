"""The `mirage` command: `mirage init --preset tiny --text rows.jsonl --output DIR`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.errors import MirageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class Preset(StrEnum):
    """Models that can be made without a network."""

    TINY = "tiny"


@app.callback()
def root() -> None:
    """Trains Qwen2.5-VL to reason with latent visual tokens."""


@app.command()
def init(
    text: Annotated[Path, typer.Option(help="JSONL rows; their texts train the tokenizer.")],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    preset: Annotated[Preset, typer.Option(help="Which model to make.")] = Preset.TINY,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Writes a complete Hugging Face folder with a small random Qwen2.5-VL."""
    # Imported here, as torch and transformers take seconds that --help should not.
    from mirage_ds.preset import write_tiny

    write_tiny(text, output, seed)
    typer.echo(f"wrote a {preset} model to {output}")


def main() -> None:
    """A user's mistake is one message and exit code 2; a bug keeps its traceback."""
    try:
        app()
    except MirageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
