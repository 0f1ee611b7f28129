"""The training settings that decoding needs: `mirage export` writes them to config.json, decoding reads them.

config.json: {"mirage": {"latent_size": 4, "stage": "stage2", "system_turn": true,
                         "exif_orientation": true, "compress_strategy": "average",
                         "answer_sees_image": true, "text_dropout_image": 0.0,
                         "latent_token_ids": {"pad": 151665, "start": 151666, "end": 151667}}, ...}
"""

from pathlib import Path

from pydantic import Field, ValidationError
from transformers import PreTrainedConfig

from mirage_ds.config import CompressStrategy, ModelConfig, Stage
from mirage_ds.config_values import NonNegativeInt, PositiveInt, Section
from mirage_ds.errors import ConfigError

KEY = "mirage"


class LatentTokenIds(Section):
    """Ids of the three latent tokens."""

    pad: NonNegativeInt
    start: NonNegativeInt
    end: NonNegativeInt


class LatentSettings(Section):
    """The `mirage` entry of config.json."""

    latent_size: PositiveInt
    """K: latent tokens per helper image."""
    stage: Stage
    """The last trained stage; after `text` the model emits no latents."""
    system_turn: bool
    """Whether prompts start with the chat template's default system turn."""
    exif_orientation: bool = False
    """Whether images are turned as EXIF says; what was exported before this key existed was trained without."""
    answer_sees_image: bool = True
    """Whether the answer attends to the input images after its first latent block; decoding does the same."""
    text_dropout_image: float = Field(default=0.0, ge=0, le=1)
    """Share of the training rows whose images were hidden there; for the record."""
    compress_strategy: CompressStrategy = "average"
    """How helper images are pooled to latent targets; exports from before this key existed may have used another."""
    latent_token_ids: LatentTokenIds


def read_latent_settings(model: str | Path, cache_dir: Path | None = None) -> LatentSettings | None:
    """The settings in config.json of a folder or hub id; None for a model that `mirage export` did not write.

    Raises:
        ConfigError: there is no config.json, or its entry is invalid.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.json cannot be read ({model}): {error}; expected a Hugging Face folder or hub id; name one that "
            "`mirage export` wrote"
        ) from error
    if KEY not in config:
        return None
    try:
        return LatentSettings.model_validate(config[KEY])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(
            f"invalid latent settings in config.json ({model}, entry {KEY!r}): {problems}; expected what `mirage "
            "export` writes; export the run again"
        ) from error


def check_latent_size(config: ModelConfig) -> None:
    """Refuses to train a model further with another latent_size than it was trained with.

    Raises:
        ConfigError: it was exported from a run with latents of another latent_size, or config.json cannot be read.
    """
    settings = read_latent_settings(config.path, config.cache_dir)
    if settings is not None and settings.stage != "text" and settings.latent_size != config.latent_size:
        raise ConfigError(
            f"the model was trained with latent_size {settings.latent_size}, model.latent_size is {config.latent_size} "
            f"(model.path={config.path}); both must agree; set model.latent_size={settings.latent_size}, or start from "
            "another model"
        )
