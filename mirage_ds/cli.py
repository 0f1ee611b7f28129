"""The `mirage` command: `mirage init --preset tiny --text rows.jsonl --output DIR`, `mirage init --from MODEL ...`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.errors import ConfigError, MirageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class Preset(StrEnum):
    """Models that can be made without a network."""

    TINY = "tiny"


@app.callback()
def root() -> None:
    """Trains Qwen2.5-VL to reason with latent visual tokens."""


@app.command()
def init(
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    preset: Annotated[Preset | None, typer.Option(help="Make a small random model.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --preset: JSONL rows, for its tokenizer.")] = None,
    seed: Annotated[int, typer.Option(help="With --preset: seed of the random weights.")] = 0,
    source: Annotated[
        str | None, typer.Option("--from", help="Copy this Qwen2.5-VL (folder or hub id), with the latent tokens.")
    ] = None,
    processor_from: Annotated[
        str | None, typer.Option(help="With --from: where tokenizer and image processor are if that model lacks them.")
    ] = None,
) -> None:
    """Writes a complete Hugging Face folder: a small random Qwen2.5-VL, or a copy of one with the latent tokens."""
    # Imported here, as torch and transformers take seconds that --help should not.
    if preset and text and not source and not processor_from:
        from mirage_ds.preset import write_tiny

        write_tiny(text, output, seed)
        typer.echo(f"wrote a {preset} model to {output}")
    elif source and not preset and not text:
        from mirage_ds.pretrained import copy_pretrained

        copy_pretrained(source, output, processor_from)
        typer.echo(f"wrote {source} with the latent tokens to {output}")
    else:
        raise ConfigError(
            "the options do not name one model (on the command line); allowed is --preset with --text, or --from with "
            "or without --processor-from; leave out the others"
        )


class Dtype(StrEnum):
    """What an export's weights are stored in."""

    BF16 = "bf16"
    FP32 = "fp32"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its last checkpoint), or one checkpoint in it.")],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; unset: what the run computed in, its train.dtype.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, for example 500MB.")] = "5GB",
    model: Annotated[
        str | None, typer.Option(help="The model that the run started from, if it is no longer at its model.path.")
    ] = None,
) -> None:
    """Writes a checkpoint as a complete Hugging Face folder, which plain transformers loads."""
    from mirage_ds.export import export_checkpoint

    summary = export_checkpoint(checkpoint, output, dtype=dtype, max_shard_size=max_shard_size, model=model)
    typer.echo(f"wrote {summary} to {output}")


def main() -> None:
    """A user's mistake is one message and exit code 2; a bug keeps its traceback."""
    try:
        app()
    except MirageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
