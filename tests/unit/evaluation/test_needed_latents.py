"""Replacements are real: a task whose answer stands in the helper image alone, learnt by a tiny model in stage 1.

The question's image says nothing about the answer, so the model cannot make the states itself: it solves the task with
the oracle's latents, and guesses with all others.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from generated_rows import write_jsonl
from hidden_latents import hide_latents
from PIL import Image
from typer.testing import CliRunner

from mirage_ds.cli import app
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.rows import read_rows
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference import generate
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel

COLORS = {"A": "red", "B": "lime", "C": "blue", "D": "yellow"}
LATENT_SIZE, NUM_STEPS, LR = 2, 120, 2e-3
ARMS = ("own", "none", "markers", "zeroed", "mean", "fixed", "noise:1.0", "shuffled", "oracle", "first")
NUM_TESTS = 32
GUESSED = 0.5  # at most: a share of 1/4 of 32 rows, and three standard deviations

pytestmark = pytest.mark.slow


def write(folder: Path, name: str, shades: range) -> Path:
    """A row for each shade of the question's image and each color of the helper image."""
    rows = []
    for number, (shade, (letter, color)) in enumerate(product(shades, COLORS.items())):
        images = {"image_input": (shade,) * 3, "image_output": color}
        for field, fill in images.items():
            Image.new("RGB", (56, 56), fill).save(folder / f"{name}_{number}_{field}.png")
        paths = {field: f"{name}_{number}_{field}.png" for field in images}
        answer = f"<output_image>\\boxed{{{letter}}}"
        rows.append({"text_input": "Which one?", "text_output": answer, "letter": letter, **paths})
    return write_jsonl(folder / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a model that has learnt the task, and questions that it has not seen."""
    folder = tmp_path_factory.mktemp("learnt")
    rows = write(folder, "train", range(0, 256, 64))
    write_tiny(rows, folder / "model", seed=0)
    encoder = load_encoder(str(folder / "model"), stage="stage1", latent_size=LATENT_SIZE)
    batch = collate([encoder(sample) for _, sample in read_rows(rows)], align_latents=False)
    backbone = load_backbone(str(folder / "model"), dtype=torch.float32)
    model = MirageModel(backbone, stage="stage1", ce_loss_weight=1.0, recompute=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 10, 2 * (1 - step / NUM_STEPS))
        optimizer.zero_grad()
        (model(batch).loss / len(batch.keys)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    backbone.hf.save_pretrained(folder / "model")
    return folder / "model", write(folder, "test", range(20, 250, 30))


@pytest.fixture
def rates(learnt: tuple[Path, Path], tmp_path: Path) -> Callable[[], dict[str, float]]:
    """Evaluates, and returns the share of right answers by arm."""

    def evaluate() -> dict[str, float]:
        model, questions = learnt
        output = tmp_path / "results"
        options = (
            "--task",
            "none",
            "--latents",
            ",".join(ARMS),
            "--latent-size",
            LATENT_SIZE,
            "--batch-size",
            NUM_TESTS,
        )
        files = ("--model", model, "--data", questions, "--output", output, "--max-new-tokens", 16)
        arguments = [str(argument) for argument in ("evaluate", *files, *options)]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(lines) == NUM_TESTS * len(ARMS)
        right: dict[str, list[bool]] = {arm: [] for arm in ARMS}
        for line in lines:
            right[line["arm"]].append(line["text"] == f"\\boxed{{{line['row']['letter']}}}")
        return {arm: sum(each) / len(each) for arm, each in right.items()}

    return evaluate


def test_only_the_oracle_s_latents_solve_it(rates: Callable[[], dict[str, float]]) -> None:
    found = rates()
    assert found["oracle"] >= 0.9, found
    assert all(rate <= GUESSED for arm, rate in found.items() if arm != "oracle"), found


def test_not_if_the_answer_does_not_attend_to_them(
    rates: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = generate.load_decoder

    def load_hiding(*arguments: Any, **options: Any) -> tuple:
        decoder, encoder = load(*arguments, **options)
        return hide_latents(decoder), encoder

    monkeypatch.setattr(generate, "load_decoder", load_hiding)
    found = rates()
    assert len({rate for arm, rate in found.items() if arm not in ("none", "markers")}) == 1, found
    assert found["oracle"] <= GUESSED
