"""`mirage inspect`: answers the rows of a file in every arm, and writes a page to look at.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from mirage_ds.errors import name_full_disk
from mirage_ds.evaluation.arms import OWN, parse_arms
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import check_rows, load_task
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
from mirage_ds.versions import versions


@expanded("model")
def inspect(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New HTML file.")],
    task: Annotated[str, typer.Option(help="How answers are scored, as for `mirage evaluate`.")] = "none",
    latents: Annotated[str, typer.Option(help="What is fed at the latents, as for `mirage evaluate`.")] = (
        "own,none,mean,shuffled"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Rows that are shown, spread evenly over those that are asked.")] = 20,
    limit: Annotated[int | None, typer.Option(min=1, show_default="all", help="Rows to ask, from the first.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the draws with a temperature, and of the replacements.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers a file's questions with own and replaced latents, and writes one HTML file about them."""
    check_model(model, f"--model {model}")
    results = Results(output)
    how, arms = load_task(task), parse_arms(latents)
    asked = read_questions_of(data, arms, helpers=True, limit=limit)
    for row, reason in check_rows(asked, how):
        typer.echo(f"not scored: {row.where}: {reason}", err=True)

    from mirage_ds.evaluation.engine import Engine, Ranks
    from mirage_ds.evaluation.parts import Parts
    from mirage_ds.evaluation.report.page import render
    from mirage_ds.evaluation.report.view import contents_of

    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    with name_full_disk(output.parent, "free some space, or name another --output, and start again"), results:
        decoder, encoder = options.load()
        settings: dict[str, Any] = {"task": task, "data": str(data), "limit": limit, "batch_size": batch_size}
        settings |= {"arms": latents} | asdict(options)
        settings |= {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
        engine = Engine(decoder, encoder, asked, how, arms, batch_size=batch_size, seed=seed)
        parts = Parts(results.parts, 0, settings, decoder.backbone.embed_tokens.embedding_dim)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(task, total=len(asked) * len(arms))
            engine.run(parts, Ranks(), lambda number: progress.advance(bar, number))
        facts = {name: str(value) for name, value in (settings | versions()).items()}
        page = render(contents_of(engine, parts, rows, data=str(data), facts=facts))
        results.write(page)
        parts.close()
        parts.remove()
    typer.echo(f"wrote {output}")
