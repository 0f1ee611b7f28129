"""What decoding must know of how a model was trained: `mirage export` writes it into config.json, decoding reads it.

config.json: {"mirage": {"latent_size": 4, "stage": "stage2", "system_turn": true,
                         "latent_token_ids": {"pad": 151665, "start": 151666, "end": 151667}}, ...}
"""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt, ValidationError
from transformers import PreTrainedConfig

from mirage_ds.config import Section, Stage
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
    """The last stage that was trained; after `text` the model emits no latents."""
    system_turn: bool
    """Prompts begin with the system turn that the chat template writes by itself."""
    latent_token_ids: LatentTokenIds


def read_latent_settings(model: str | Path, cache_dir: Path | None = None) -> LatentSettings | None:
    """The settings in config.json of a folder or hub id; None of a model that `mirage export` did not write.

    Raises:
        ConfigError: there is no config.json, or its entry is a wrong one.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.json cannot be read ({model}): {error}; allowed is a Hugging Face folder or hub id; name one that "
            "`mirage export` wrote"
        ) from error
    if KEY not in config:
        return None
    try:
        return LatentSettings.model_validate(config[KEY])
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(
            f"wrong latent settings in config.json ({model}, entry {KEY!r}): {problems}; allowed is what `mirage "
            "export` writes; export the run again"
        ) from error
