"""`mirage inspect`: answers the rows of a file in every arm, and writes a page to look at.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mirage_ds.evaluation.asked import Request, check_options
from mirage_ds.evaluation.command import Answers, ImageOption, answer_all
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.ranks import Ranks
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
from mirage_ds.paths import expanded
from mirage_ds.versions import versions

if TYPE_CHECKING:
    from mirage_ds.evaluation.engine import Engine
    from mirage_ds.evaluation.latents.states import States


@expanded("model")
def inspect(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New HTML file.")],
    task: Annotated[str, typer.Option(help="How answers are scored, as for `mirage evaluate`.")] = "none",
    latents: Annotated[str, typer.Option(help="What is fed at the latents, as for `mirage evaluate`.")] = (
        "own,none,mean,shuffled"
    ),
    image: ImageOption = OWN,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows that are shown, spread evenly over those that are asked.")
    ] = 20,
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
    """Answers a file's questions with own and replaced latents or images, and writes one HTML file about them."""
    request = Request(task, data, output, latents, image, limit=limit, batch_size=batch_size)
    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    asked = check_options(request, options, helpers=True)
    for row, reason in asked.unscored:
        typer.echo(f"not scored: {row.where}: {reason}", err=True)

    def finish(engine: "Engine", answers: Answers, states: "States", settings: dict[str, Any]) -> None:
        from mirage_ds.evaluation.report.page import render
        from mirage_ds.evaluation.report.view import contents_of

        facts = settings | {"arms": ", ".join(arm.name for arm in asked.arms)} | versions()
        shown = {name: str(value) for name, value in facts.items() if value is not None}
        page = contents_of(engine, answers, states, rows, model=model, data=str(data), task=asked.task, facts=shown)
        asked.results.finish_page(render(page))
        typer.echo(f"wrote {output}")

    answer_all(asked, options, Ranks(), finish)
