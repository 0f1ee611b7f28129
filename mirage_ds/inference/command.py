"""`mirage generate`: answers one question in the terminal.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
from mirage_ds.inference.question import read_question
from mirage_ds.model_folder import check_model
from mirage_ds.paths import expanded


@expanded("model")
def generate(
    model: ModelOption,
    prompt: Annotated[
        str, typer.Option(help="The question. <image> marks an image's place; without it, images come first.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeat the option for more.")] = None,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: Annotated[
        Literal["own", "none", "markers", "zeroed"],
        typer.Option(
            help="What is fed at the latents: the model's own states, no block at all, a block without a state, or "
            "zeros. The other replacements need the rows of a file: see `mirage evaluate`."
        ),
    ] = "own",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="With a temperature: seed of the draws.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers one question and prints the answer as it is decoded, with one mark per latent."""
    check_model(model, f"--model {model}")
    question = read_question(prompt, image or [])

    from mirage_ds.inference.replaced import REPLACED
    from mirage_ds.inference.terminal import answer

    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    decoder, encoder = options.load()
    if latents != "own":
        decoder = REPLACED[latents](decoder)
    if not answer(decoder, encoder, question):
        typer.echo(f"The answer was cut off after {max_new_tokens} tokens (--max-new-tokens).", err=True)
