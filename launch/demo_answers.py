"""The answers of the demo's models to the held-out maps, and of the last one with its latents replaced."""

import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from launch.demo_report import LABELS
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.arms import OWN, parse_arms
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.parts import Parts
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.inference.generate import load_decoder

TASK = "vsp-spatial-planning"
BATCH_SIZE, MAX_NEW_TOKENS, SHUFFLE_SEED = 50, 24, 0


def held_out_answers(
    models: dict[str, Path], file: Path, latent_size: int, console: Console
) -> dict[str, list[Answer]]:
    """The answers of every model, by its name; then those of the last model with other vectors at its latents."""
    rows, task = read_questions_of(file), load_task(TASK)
    answers: dict[str, list[Answer]] = {}
    for name, folder in models.items():
        started_s = time.monotonic()
        decoder, encoder = load_decoder(
            str(folder),
            latent_size=latent_size,
            system_turn=False,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=torch.float32,
        )
        arms = parse_arms("shuffled,mean,zeroed" if name == list(models)[-1] else OWN)
        engine = Engine(decoder, encoder, rows, task, arms, batch_size=BATCH_SIZE, seed=SHUFFLE_SEED)
        with tempfile.TemporaryDirectory() as folder_of_parts:
            parts = Parts(Path(folder_of_parts), 0, decoder.backbone.embed_tokens.embedding_dim)
            engine.run(parts, Ranks())
            by_arm = engine.in_order(parts.answers())
            parts.close()
        answers |= {name if arm == OWN else f"{name}_{arm}": each for arm, each in by_arm.items()}
        console.print(f"{LABELS[name].strip()}: {time.monotonic() - started_s:.0f} s", highlight=False)
    return answers
