"""The options by which commands measure rows for a model, as a recipe has them. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.model_folder import check_model

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Model folder or hub id, as model.path: lengths in its tokens.")
]
LatentSizeOption = Annotated[int, typer.Option("--latent-size", min=1, help="As model.latent_size.")]
MinPixelsOption = Annotated[int | None, typer.Option("--min-pixels", min=1, help="As data.min_pixels.")]
MaxPixelsOption = Annotated[int | None, typer.Option("--max-pixels", min=1, help="As data.max_pixels.")]
SystemTurnOption = Annotated[bool, typer.Option(help="As data.system_turn.")]
CacheOption = Annotated[Path | None, typer.Option("--cache-dir", help="As model.cache_dir.")]
LATENT_SIZE = 4  # the default of model.latent_size


@dataclass(frozen=True)
class ModelOptions:
    """What decides, beside the rows, how many tokens and patches they have."""

    model: str
    latent_size: int = LATENT_SIZE
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_turn: bool = True
    cache_dir: Path | None = None

    def check(self) -> None:
        """Raises: ConfigError: the model's folder is missing or damaged. Loads nothing."""
        check_model(self.model, f"--model {self.model}", self.cache_dir)
