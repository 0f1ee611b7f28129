"""`mirage evaluate`: its options, and what it prints.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from mirage_ds.errors import name_full_disk
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.arms import OWN, parse_arms
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import Task, check_rows, load_task
from mirage_ds.evaluation.tables import summary_of, tables_of
from mirage_ds.inference.options import (
    Decoding,
    DtypeOption,
    LatentEndOption,
    LatentSizeOption,
    MaxNewTokensOption,
    ModelOption,
    TemperatureOption,
    TopPOption,
)
from mirage_ds.model_folder import check_model
from mirage_ds.paths import expanded


@expanded("model")
def evaluate(
    model: ModelOption,
    task: Annotated[str, typer.Option(help="How answers are scored.")],
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New JSONL file, a line per answer; FILE.summary.json is written too.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: Annotated[
        str, typer.Option(help="What is fed at the latents: one or more of the names in the documentation.")
    ] = OWN,
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the draws with a temperature, and of the replacements.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers and scores the questions of a file, and prints the success rates."""
    check_model(model, f"--model {model}")
    results = Results(output)
    how, arms = load_task(task), parse_arms(latents)
    rows = read_questions_of(data, arms)
    for row, reason in check_rows(rows, how):
        typer.echo(f"not scored: {row.where}: {reason}", err=True)

    from mirage_ds.evaluation.engine import Engine, Ranks
    from mirage_ds.evaluation.parts import Parts

    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    with name_full_disk(output.parent, "free some space, or name another --output, and start again"), results:
        decoder, encoder = options.load()
        settings = asdict(options) | {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
        settings = {"task": task, "data": str(data), "batch_size": batch_size, "arms": latents} | settings
        engine = Engine(decoder, encoder, rows, how, arms, batch_size=batch_size, seed=seed)
        parts = Parts(results.parts, 0, settings, decoder.backbone.embed_tokens.embedding_dim)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(task, total=len(rows) * len(arms))
            engine.run(parts, Ranks(), lambda number: progress.advance(bar, number))
        answers = engine.in_order(parts.answers())
        every = [answer for arm in answers.values() for answer in arm]
        results.finish(every, summary_of(answers, how) | {"settings": settings})
        parts.close()
        parts.remove()
    report(answers, how)


def report(answers: dict[str, list[Answer]], task: Task) -> None:
    """Prints what came out."""
    for table in tables_of(answers, task):
        Console().print(table)
