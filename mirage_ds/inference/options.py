"""The options that `mirage generate`, `evaluate` and `inspect` share, and the decoder that they make."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mirage_ds.config import Dtype, LatentEnd

ModelOption = Annotated[str, typer.Option("--model", help="A folder that `mirage export` wrote, or a hub id.")]
LatentSizeOption = Annotated[
    int | None,
    typer.Option("--latent-size", min=1, show_default="from the model folder", help="Latents per block."),
]
LatentEndOption = Annotated[
    LatentEnd,
    typer.Option(
        "--latent-end",
        help="When a block ends. fixed: after --latent-size latents. model: at <|latent_end|>, or after as many.",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Limit of an answer, latents included.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: greedy decoding.")]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", help="With a temperature: draw from the likeliest tokens that have this probability."),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", show_default="bf16 on a GPU, fp32 on the CPU", help="Dtype to compute in.")
]


@dataclass(frozen=True)
class Decoding:
    """The options of decoding."""

    model: str
    latent_size: int | None
    latent_end: LatentEnd
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    dtype: Dtype | None

    def load(self, *, announce: bool = True) -> Any:
        """Decoder and encoder.

        Args:
            announce: print to stderr how the model is computed.
        """
        from transformers.utils import logging

        from mirage_ds.inference.generate import load_decoder
        from mirage_ds.inference.sampling import Sampling
        from mirage_ds.model.backbone import DTYPES

        logging.disable_progress_bar()
        decoder, encoder = load_decoder(
            self.model,
            latent_size=self.latent_size,
            latent_end=self.latent_end,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, self.seed),
            dtype=DTYPES[self.dtype] if self.dtype else None,
        )
        if announce:
            hidden = "" if decoder.answer_sees_image else ", input images hidden after the first latent block"
            computed = decoder.backbone.describe()
            typer.echo(f"{self.model}: latent_size {decoder.latent_size}, {computed}{hidden}", err=True)
        return decoder, encoder
