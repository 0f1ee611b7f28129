"""The model card says what the run's files say, and nothing of the machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GenerationConfig

from mirage_ds.config import Config
from mirage_ds.hf.model_card import model_card

FACTS = {"step": 30, "max_steps": 40, "global_batch_size": 64, "manifest_digest": "ab12" * 16, "world_size": 8}


def config_of(run_dir: Path, **settings: dict[str, Any]) -> Config:
    sections = {
        "run": {"dir": str(run_dir)},
        "model": {"path": "models/secret-place", "cache_dir": "/secret/cache"},
        "data": {"shards": "/secret/shards"},
        "train": {"stage": "stage1", "max_steps": 40, "lr": 3e-4},
    }
    return Config.model_validate({name: values | settings.get(name, {}) for name, values in sections.items()})


def card_of(run_dir: Path, base: str = "Org/Base-3B", generation: dict[str, Any] | None = None, **settings: Any) -> str:
    return model_card(config_of(run_dir, **settings), FACTS, run_dir, base, GenerationConfig(**(generation or {})))


def metadata_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With records of several steps, and evaluations after two of them."""
    (tmp_path / "evaluations").mkdir()
    records = [
        {"step": step, "position": 64 * step, "loss": step / 7, "ce_loss": 0.25, "latent_loss": 0.125}
        for step in (3, 30, 31)
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "metrics.jsonl").write_text(lines[0] + '{"step": 30, "loss": 99' + "\n" + lines[1] + lines[2])
    (tmp_path / "validation.jsonl").write_text(
        json.dumps({"step": 20, "loss": 5.5, "ce_loss": 5.5, "latent_loss": 0}) + "\n"
    )
    for step, rate in ((20, 0.75), (30, 0.5)):
        summary = {
            "task": "choice",
            "settings": {"max_new_tokens": 96, "rows": "0123456789abcdef", "data": "/secret/rows.jsonl"},
            "arms": {
                "own": {"rates": {"exact": {"rate": rate, "low": 0.4, "high": 0.6, "num_rows": 80}}},
                "mean": {"rates": {"exact": {"rate": 0.25, "low": 0.2, "high": 0.3, "num_rows": 80}}},
                "none": {"num_answers": 80},
            },
        }
        (tmp_path / "evaluations" / f"step_{step}.jsonl.summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_a_run_with_everything(run: Path) -> None:
    card = card_of(run, run={"init_from": "/secret/run"}, train={"dtype": "fp32"})
    assert metadata_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "Org/Base-3B",
        "tags": ["mirage_ds", "latent-visual-tokens", "custom_generate"],
    }
    assert "# Base-3B, mirage_ds stage1\n" in card
    for row in (
        "step | 30 of 40",
        "samples per step | 64",
        f"digest of the data | {FACTS['manifest_digest']}",
        "seed | 42",
    ):
        assert f"| {row} |\n" in card
    assert "| weights at the start | of another run of mirage_ds |" in card
    assert "| training | 4.286 | 0.25 | 0.125 |\n" in card
    assert "validation |" not in card, "it has none of this step"
    assert "| own | exact | 50.0% | 40.0% - 60.0% | 80 |\n| mean | exact | 25.0% | 20.0% - 30.0% | 80 |\n" in card
    assert "75.0%" not in card, "of another step"
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == {"train": {"stage": "stage1", "max_steps": 40, "lr": 3e-4, "dtype": "fp32"}}
    assert "secret" not in card
    assert str(run) not in card


def test_a_run_that_left_nothing(tmp_path: Path) -> None:
    """And a base model that is a folder."""
    base = tmp_path / "secret-place"
    base.mkdir()
    facts = {"step": 3}
    card = model_card(config_of(tmp_path), facts, tmp_path, str(base), GenerationConfig())
    assert "base_model" not in metadata_of(card)
    assert "| base model | a folder, not a hub id |\n" in card
    assert "| step | 3 |\n" in card
    for absent in ("None", "Losses", "Evaluation\n", "digest", "secret", "generation_config"):
        assert absent not in card


def test_what_is_lost_without_trust(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    assert "trust_remote_code=True" in card
    assert "no state is fed back" in card
    assert "visible after" not in card
    assert "images stay visible after the first block" in card_of(tmp_path, model={"answer_sees_image": False})
    assert "without the system turn" in card_of(tmp_path, data={"system_turn": False})
    text = card_of(tmp_path, train={"stage": "text"})
    assert "trust_remote_code" not in text
    assert metadata_of(text)["tags"] == ["mirage_ds"]
    assert text.count('pipeline("image-text-to-text", "FOLDER")') == 1


def test_generation_defaults_that_are_not_greedy(tmp_path: Path) -> None:
    card = card_of(tmp_path, generation={"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05})
    assert "(do_sample=True, repetition_penalty=1.05)" in card
    assert "give `do_sample=False, repetition_penalty=1.0`" in card


def test_a_damaged_evaluation_is_left_out_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations" / "step_30.jsonl.summary.json").write_text('{"arms": ')
    assert "## Evaluation" not in card_of(run)
    assert "no evaluation" in capsys.readouterr().err
