"""The `mirage` command: makes a model folder before training; exports, asks, evaluates and compares models after it.

mirage init --preset tiny --text rows.jsonl --output DIR | --from MODEL --output DIR
mirage export --checkpoint RUN --output DIR
mirage generate --model DIR --image a.png --prompt "..."
mirage evaluate --model DIR --task vsp-spatial-planning --data test.jsonl --output results.jsonl
mirage compare results.jsonl others.jsonl
mirage inspect --model DIR --data test.jsonl --output report.html
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mirage_ds import errors, library_noise
from mirage_ds.config import Dtype
from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.command import evaluate
from mirage_ds.evaluation.compare_command import compare
from mirage_ds.evaluation.inspect import inspect
from mirage_ds.inference.command import generate
from mirage_ds.model_folder import check_exists, check_model
from mirage_ds.output_folder import check_output
from mirage_ds.paths import check_file, check_folder, expanded
from mirage_ds.versions import check_versions, warn_if_newer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


Preset = Literal["tiny"]
"""Models that can be made without network access."""


@app.callback()
def root() -> None:
    """Trains Qwen2.5-VL to reason with latent visual tokens."""
    check_versions()
    warn_if_newer()


@app.command()
@expanded("source", "processor_from")
def init(
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    preset: Annotated[Preset | None, typer.Option(help="Make a small random model.")] = None,
    text: Annotated[Path | None, typer.Option(help="With --preset: JSONL rows to train the tokenizer on.")] = None,
    seed: Annotated[int, typer.Option(help="With --preset: seed of the random weights.")] = 0,
    source: Annotated[
        str | None, typer.Option("--from", help="Copy this Qwen2.5-VL (folder or hub id) and add the latent tokens.")
    ] = None,
    processor_from: Annotated[
        str | None,
        typer.Option(
            help="With --from: take tokenizer and image processor from this model if the copied one has none."
        ),
    ] = None,
) -> None:
    """Writes a complete Hugging Face folder: a small random Qwen2.5-VL, or a copy of one with the latent tokens."""
    check_output(output)
    # Imported here, because torch and transformers take seconds to import.
    if preset and text and not source and not processor_from:
        check_file(text, "--text", "a JSONL file of rows")
        from transformers.utils import logging

        logging.disable_progress_bar()  # one file of a few MB
        from mirage_ds.hf.preset import write_tiny

        write_tiny(text, output, seed)
        typer.echo(f"wrote a {preset} model to {output}")
    elif source and not preset and not text:
        check_model(source, f"--from {source}")
        if processor_from:
            check_exists(processor_from, f"--processor-from {processor_from}")
        from mirage_ds.hf.pretrained import copy_pretrained

        copy_pretrained(source, output, processor_from)
        typer.echo(f"wrote {source} with the latent tokens to {output}")
    else:
        raise ConfigError(
            "the options do not name one model (on the command line); expected --preset with --text, or --from with "
            "or without --processor-from; add the missing option, or remove those that do not belong"
        )


@app.command()
@expanded("model")
def export(
    checkpoint: Annotated[
        Path, typer.Option(help="A run's folder (uses its last checkpoint), or one checkpoint in it.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for the model.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Weight dtype (default: the run's train.dtype).")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 500MB.")] = "5GB",
    model: Annotated[
        str | None, typer.Option(help="The model that the run started from, if it has moved from its model.path.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA run: a complete folder, with what was learnt in its weights.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA run: files for peft, for the same base.")
    ] = False,
) -> None:
    """Writes a checkpoint as a complete Hugging Face folder that plain transformers loads, or as files for peft."""
    check_folder(checkpoint, "--checkpoint", "a run's folder, or one of its checkpoints/global_stepN")
    check_output(output)
    if model:
        check_model(model, f"--model {model}")
    if merge and adapter:
        raise ConfigError(
            "--merge and --adapter are two forms of the same export (on the command line); one folder has one of them; "
            "leave one option out, or export twice"
        )
    from mirage_ds.hf.export import export_checkpoint

    form: Literal["merge", "adapter"] | None = "merge" if merge else "adapter" if adapter else None
    summary = export_checkpoint(checkpoint, output, dtype=dtype, max_shard_size=max_shard_size, model=model, form=form)
    typer.echo(f"wrote {summary} to {output}")


app.command()(generate)
app.command()(evaluate)
app.command()(compare)
app.command()(inspect)


def main() -> None:
    library_noise.silence()
    errors.run(app)


if __name__ == "__main__":  # as mirage-launch starts it
    main()
