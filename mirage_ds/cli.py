"""The `mirage` command: a model folder before training, and what is done with one afterwards.

mirage init --preset tiny --text rows.jsonl --output DIR | --from MODEL --output DIR
mirage export --checkpoint RUN --output DIR
mirage generate --model DIR --image a.png --prompt "..."
mirage evaluate --model DIR --task vsp-spatial-planning --data test.jsonl --output results.jsonl
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mirage_ds import errors, library_noise
from mirage_ds.config import Dtype, LatentEnd, TaskName
from mirage_ds.errors import ConfigError, name_full_disk
from mirage_ds.paths import check_file, check_folder, check_model
from mirage_ds.versions import check_versions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


Preset = Literal["tiny"]
"""Models that can be made without a network."""
Latents = Literal["fed", "zeroed"]
"""What a latent's input is."""

# What `generate` and `evaluate` both take.
ModelOption = Annotated[str, typer.Option("--model", help="A folder that `mirage export` wrote, or a hub id.")]
LatentSizeOption = Annotated[
    int | None, typer.Option("--latent-size", min=1, show_default="what the folder says", help="Latents in a block.")
]
LatentEndOption = Annotated[
    LatentEnd,
    typer.Option("--latent-end", help="A block ends after --latent-size states, or where the model ends it before."),
]
LatentsOption = Annotated[
    Latents, typer.Option("--latents", help="Feed back the hidden states, or zeros, to see what the latents are worth.")
]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Latents count too.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: greedy decoding.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="With a temperature: the likeliest tokens to draw from.")]
SeedOption = Annotated[int, typer.Option("--seed", help="With a temperature: same seed, same answers.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", show_default="bf16 on a GPU, fp32 on the CPU", help="What to compute in.")
]


@app.callback()
def root() -> None:
    """Trains Qwen2.5-VL to reason with latent visual tokens."""
    check_versions()


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
        check_file(text, "--text", "a JSONL file of rows")
        from transformers.utils import logging

        logging.disable_progress_bar()  # one file of a few MB
        from mirage_ds.hf.preset import write_tiny

        write_tiny(text, output, seed)
        typer.echo(f"wrote a {preset} model to {output}")
    elif source and not preset and not text:
        check_model(source, f"--from {source}")
        from mirage_ds.hf.pretrained import copy_pretrained

        copy_pretrained(source, output, processor_from)
        typer.echo(f"wrote {source} with the latent tokens to {output}")
    else:
        raise ConfigError(
            "the options do not name one model (on the command line); allowed is --preset with --text, or --from with "
            "or without --processor-from; leave out the others"
        )


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
    check_folder(checkpoint, "--checkpoint", "a run's folder, or one of its checkpoints/global_stepN")
    from mirage_ds.hf.export import export_checkpoint

    summary = export_checkpoint(checkpoint, output, dtype=dtype, max_shard_size=max_shard_size, model=model)
    typer.echo(f"wrote {summary} to {output}")


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="The question; <image> marks where an image goes, else all in front.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; give the option once for each.")] = None,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: LatentsOption = "fed",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers one question, word by word; each latent is one mark."""
    check_model(model, f"--model {model}")
    for path in image or []:
        check_file(path, "--image", "an image file")
    from mirage_ds.inference.terminal import answer, read_question

    question = read_question(prompt, image or [])
    options = Decoding(model, latent_size, latent_end, latents, max_new_tokens, temperature, top_p, seed, dtype)
    decoder, encoder = options.load()
    if not answer(decoder, encoder, question):
        typer.echo(f"cut off after {max_new_tokens} tokens (--max-new-tokens)", err=True)


@app.command()
def evaluate(
    model: ModelOption,
    task: Annotated[TaskName, typer.Option(help="How answers are scored.")],
    data: Annotated[Path, typer.Option(help="JSONL rows; prompts and images are taken from them.")],
    output: Annotated[Path, typer.Option(help="New JSONL file, one line for each row; FILE.summary.json beside it.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded side by side.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: LatentsOption = "fed",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers a file of questions, scores the answers, and prints a table by level."""
    check_model(model, f"--model {model}")
    check_file(data, "--data", "a JSONL file of rows")
    from rich.console import Console
    from rich.progress import track

    from mirage_ds.inference.evaluate import evaluate as answers_of
    from mirage_ds.inference.evaluate import read_task
    from mirage_ds.inference.rates import success_rates, table
    from mirage_ds.inference.results import Results

    results = Results(output)
    rows = read_task(data, task)
    options = Decoding(model, latent_size, latent_end, latents, max_new_tokens, temperature, top_p, seed, dtype)
    decoder, encoder = options.load()
    with name_full_disk(output.parent, "free some space, or name another --output, and start again"), results:
        answers = answers_of(decoder, encoder, rows, task, batch_size=batch_size)
        for answer in track(answers, description=task, total=len(rows), console=Console(stderr=True)):
            results.add(answer)
        settings = asdict(options) | {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
        rates = success_rates(results.answers)
        results.finish(rates, {"task": task, "data": str(data), "batch_size": batch_size} | settings)
    Console().print(table(rates, task))
    if cut_off := sum(not answer.complete for answer in results.answers):
        typer.echo(f"{cut_off} answers were cut off after {max_new_tokens} tokens (--max-new-tokens)")


@dataclass(frozen=True)
class Decoding:
    """The options that `generate` and `evaluate` both take."""

    model: str
    latent_size: int | None
    latent_end: LatentEnd
    latents: Latents
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    dtype: Dtype | None

    def load(self) -> Any:
        """Decoder and encoder; says on stderr how the model is computed."""
        import torch
        from transformers.utils import logging

        from mirage_ds.inference.generate import as_they_are, load_decoder
        from mirage_ds.inference.sampling import Sampling
        from mirage_ds.model.backbone import DTYPES

        logging.disable_progress_bar()
        decoder, encoder = load_decoder(
            self.model,
            latent_size=self.latent_size,
            latent_end=self.latent_end,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, self.seed),
            feed=torch.zeros_like if self.latents == "zeroed" else as_they_are,
            dtype=DTYPES[self.dtype] if self.dtype else None,
        )
        typer.echo(f"{self.model}: latent_size {decoder.latent_size}, {decoder.backbone.describe()}", err=True)
        return decoder, encoder


def main() -> None:
    library_noise.silence()
    errors.run(app)
