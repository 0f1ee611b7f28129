"""The answers of the demo's models to the held-out maps, and of the last one with its latents replaced."""

import time
from pathlib import Path

import torch
from rich.console import Console

from launch.demo_report import LABELS
from mirage_ds.config import TaskName
from mirage_ds.inference.evaluate import evaluate
from mirage_ds.inference.generate import load_decoder
from mirage_ds.inference.latents import Feed, MeanStates, OwnStates, ShuffledStates, next_rows, zeroed
from mirage_ds.inference.questions import read_task
from mirage_ds.inference.results import Answer

TASK: TaskName = "vsp-spatial-planning"
BATCH_SIZE, MAX_NEW_TOKENS, SHUFFLE_SEED = 50, 24, 0


def held_out_answers(
    models: dict[str, Path], file: Path, latent_size: int, console: Console
) -> dict[str, list[Answer]]:
    """The answers of every model, by its name; then those of the last model with other vectors at its latents."""
    rows = read_task(file, TASK)
    answers: dict[str, list[Answer]] = {}

    def decode(name: str, feed: Feed) -> None:
        started_s = time.monotonic()
        decoder.feed = feed
        answers[name] = list(evaluate(decoder, encoder, rows, TASK, batch_size=BATCH_SIZE))
        console.print(f"{LABELS[name].strip()}: {time.monotonic() - started_s:.0f} s", highlight=False)

    for name, folder in models.items():
        decoder, encoder = load_decoder(
            str(folder),
            latent_size=latent_size,
            system_turn=False,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=torch.float32,
        )
        own = OwnStates()
        decode(name, own)
    decode(f"{name}_shuffled", ShuffledStates(own, next_rows(rows, SHUFFLE_SEED)))
    decode(f"{name}_mean", MeanStates(own))
    decode(f"{name}_zeroed", zeroed)
    return answers
