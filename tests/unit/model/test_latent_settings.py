"""A model that was exported from a run is trained further with the run's latent_size only."""

import json
from pathlib import Path

import pytest

from mirage_ds.config import ModelConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.latent_settings import check_latent_size, read_latent_settings

IDS = {"pad": 5, "start": 6, "end": 7}


def export(folder: Path, stage: str) -> str:
    settings = {"latent_size": 4, "stage": stage, "system_turn": True, "latent_token_ids": IDS}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "mirage": settings}))
    return str(folder)


def test_another_latent_size_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path, "stage1")
    check_latent_size(ModelConfig(path=path, latent_size=4))
    with pytest.raises(
        ConfigError, match=r"latent_size 4, model\.latent_size is 8 .*set model\.latent_size=4, or start"
    ):
        check_latent_size(ModelConfig(path=path, latent_size=8))


def test_what_was_trained_without_latents_takes_any(tmp_path: Path) -> None:
    check_latent_size(ModelConfig(path=export(tmp_path, "text"), latent_size=8))


def test_older_exports_were_trained_on_pixels_as_stored_and_saw_images(tmp_path: Path) -> None:
    settings = read_latent_settings(export(tmp_path, "stage2"))
    assert settings is not None
    assert not settings.exif_orientation
    assert settings.compress_strategy == "average"
    assert (settings.answer_sees_image, settings.text_dropout_image) == (True, 0)
