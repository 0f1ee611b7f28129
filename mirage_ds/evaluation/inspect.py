"""`mirage inspect`: answers the rows of a file in every arm, and writes a page to look at.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.inference.options import (
    DtypeOption,
    LatentEndOption,
    LatentSizeOption,
    MaxNewTokensOption,
    ModelOption,
    TemperatureOption,
    TopPOption,
)
from mirage_ds.paths import expanded


@expanded("model")
def inspect(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New HTML file.")],
    task: Annotated[str, typer.Option(help="How answers are scored, as for `mirage evaluate`.")] = "none",
    latents: Annotated[str, typer.Option(help="What is fed at the latents, as for `mirage evaluate`.")] = (
        "own,none,mean,shuffled"
    ),
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
    """Answers a file's questions with own and replaced latents, and writes one HTML file about them."""
