"""The whole of mirage_ds on one machine: maps, shards, a tiny model, three trainings, an honest table, a picture.

    make demo        or        python -m launch.demo [--output runs/demo] [--short]

A model of a million parameters learns to find the shortest way on 3x3 maps. Stage 1 and stage 2 together see as many
samples as the text baseline. What is scored: maps that no training row has, greedy decoding, strictly parsed moves.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from deepspeed.accelerator import get_accelerator
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from mirage_ds.config import TaskName
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import open_image
from mirage_ds.data.rows import Sample, read_rows
from mirage_ds.inference.evaluate import evaluate, read_task
from mirage_ds.inference.generate import Decoder, as_they_are, load_decoder
from mirage_ds.inference.rates import wilson_interval
from mirage_ds.inference.results import Answer

RECIPES = Path(__file__).parent / "recipes"
RANKS, LATENT_SIZE, MAX_NEW_TOKENS = 2, 4, 24
GLOBAL_BATCH_SIZE = 64
TASK: TaskName = "vsp-spatial-planning"
LABELS = {
    "untrained": "before training",
    "text": "text baseline",
    "stage1": "stage 1",
    "stage2": "stage 1 + stage 2",
    "stage2_zeroed": "  the same, latents zeroed",
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    num_train: int
    num_test: int
    stage1_steps: int
    stage2_steps: int
    warmup_steps: int


FULL = Size(num_train=5800, num_test=400, stage1_steps=260, stage2_steps=560, warmup_steps=30)
SHORT = Size(num_train=128, num_test=16, stage1_steps=4, stage2_steps=4, warmup_steps=1)


class Demo:
    """One demo in one folder; every step is the command that a user would type."""

    def __init__(self, output: Path, size: Size) -> None:
        self.output, self.size = output, size
        self.console = Console()
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, action: Callable[[], Any]) -> Any:
        """Runs a part, under a headline, and keeps its time."""
        self.console.rule(name)
        started_s = time.monotonic()
        result = action()
        self.seconds[name] = round(time.monotonic() - started_s, 1)
        return result

    def command(self, *arguments: object) -> None:
        """Prints and runs a command; its output goes straight to the terminal."""
        words = [str(argument) for argument in arguments]
        self.console.print("$ " + " ".join(words), style="bold", highlight=False, soft_wrap=True)
        program = str(Path(sys.executable).parent / words[0])
        code = subprocess.run([program, *words[1:]]).returncode
        if code:
            raise SystemExit(f"`{words[0]}` ended with exit code {code}; its message is above")

    def make_data(self) -> None:
        rows = self.output / "rows"
        counts = ("--num-train", self.size.num_train, "--num-test", self.size.num_test)
        shape = ("--levels", "3", "--cell-px", "28", "--prompt", "short")
        self.command("mirage-data", "make-vsp", "--output", rows, *counts, *shape)
        for split in ("train", "test"):
            self.command("mirage-data", "build", "--input", rows / f"{split}.jsonl", "--output", self.output / split)

    def make_model(self) -> None:
        rows = self.output / "rows" / "train.jsonl"
        self.command("mirage", "init", "--preset", "tiny", "--text", rows, "--output", self.output / "model")

    def train(self, stage: str, steps: int) -> None:
        accelerator = get_accelerator()
        ranks = RANKS if accelerator.device_name() == "cpu" else min(RANKS, accelerator.device_count())
        start = [f"run.init_from={self.output / 'stage1'}"] if stage == "stage2" else []
        self.command(
            "mirage-launch",
            "local",
            "--ranks",
            ranks,
            RECIPES / f"demo-{stage}.yaml",
            f"run.dir={self.output / stage}",
            f"model.path={self.output / 'model'}",
            f"data.shards={self.output / 'train'}",
            f"evaluation.shards={self.output / 'test'}",
            f"train.micro_batch_size_per_gpu={GLOBAL_BATCH_SIZE // ranks}",
            f"train.max_steps={steps}",
            f"train.warmup_steps={self.size.warmup_steps}",
            *start,
        )

    def test(self) -> dict[str, list[Answer]]:
        """The answers of every model to the held-out maps."""
        rows = read_task(self.output / "rows" / "test.jsonl", TASK)
        answers = {}
        for name in LABELS:
            started_s = time.monotonic()
            decoder, encoder = self.decoder(name)
            answers[name] = list(evaluate(decoder, encoder, rows, TASK, batch_size=50))
            self.console.print(f"{LABELS[name].strip()}: {time.monotonic() - started_s:.0f} s", highlight=False)
        return answers

    def decoder(self, name: str) -> tuple[Decoder, Encoder]:
        run, _, ablation = name.partition("_")
        return load_decoder(
            str(self.trained(run)),
            latent_size=LATENT_SIZE,
            system_turn=False,
            max_new_tokens=MAX_NEW_TOKENS,
            feed=torch.zeros_like if ablation == "zeroed" else as_they_are,
            dtype=torch.float32,
        )

    def trained(self, run: str) -> Path:
        """The folder of a run's last model, or of the one that all runs began with."""
        return self.output / ("model" if run == "untrained" else f"{run}-model")

    def export(self) -> None:
        for run in ("text", "stage1", "stage2"):
            self.command("mirage", "export", "--checkpoint", self.output / run, "--output", self.trained(run))

    def run(self) -> None:
        """All of it."""
        started_s = time.monotonic()
        size = self.size
        self.timed("Maps and shards", self.make_data)
        self.timed("A tiny random model", self.make_model)
        self.timed("Text baseline", lambda: self.train("text", size.stage1_steps + size.stage2_steps))
        self.timed("Stage 1: grounded latents", lambda: self.train("stage1", size.stage1_steps))
        self.timed("Stage 2: free latents", lambda: self.train("stage2", size.stage2_steps))
        self.timed("Models that plain transformers loads", self.export)
        answers = self.timed("Held-out maps", self.test)
        samples = [sample for _, sample in read_rows(self.output / "rows" / "test.jsonl")]
        draw_picture(samples, answers, self.output / "answers.png")
        rates = {name: sum(map(solved, answers[name])) / len(samples) for name in LABELS}
        summary: dict[str, Any] = {f"success_{name}": rate for name, rate in rates.items()}
        summary |= {"num_test": len(samples), "seconds": self.seconds}
        summary["seconds_total"] = round(time.monotonic() - started_s, 1)
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.report(rates, len(samples))

    def report(self, rates: dict[str, float], num_test: int) -> None:
        self.console.rule("Results")
        table = Table(title=f"Shortest ways found on {num_test} held-out 3x3 maps")
        for heading in ("model", "solved", "95% interval", "samples seen"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        batch = GLOBAL_BATCH_SIZE
        both = self.size.stage1_steps + self.size.stage2_steps
        seen = {"untrained": 0, "text": both, "stage1": self.size.stage1_steps, "stage2": both, "stage2_zeroed": both}
        for name, rate in rates.items():
            low, high = wilson_interval(round(rate * num_test), num_test)
            table.add_row(LABELS[name], f"{rate:.1%}", f"{low:.1%} - {high:.1%}", f"{seen[name] * batch}")
        self.console.print(table)
        difference = 100 * (rates["stage2"] - rates["text"])
        self.console.print(
            f"Latents against text only: {difference:+.1f} points. Latents against the same model with its latents "
            f"zeroed: {100 * (rates['stage2'] - rates['stage2_zeroed']):+.1f} points.",
            highlight=False,
        )
        for part, seconds in self.seconds.items():
            self.console.print(f"{seconds:7.1f} s  {part}", highlight=False)
        self.console.print(
            f"Picture: {self.output / 'answers.png'}   Figures: {self.output / 'summary.json'}\n"
            f"Curves:  tensorboard --logdir {self.output}",
            highlight=False,
        )
        question = json.loads((self.output / "rows" / "test.jsonl").read_text().splitlines()[0])
        self.console.print(
            f"Ask it:  mirage generate --model {self.trained('stage2')} --prompt {shlex.quote(question['text_input'])} "
            f"--image {self.output / 'rows' / question['image_input']}",
            highlight=False,
            soft_wrap=True,
        )


def solved(answer: Answer) -> bool:
    """Whether an answer's moves, strictly parsed, end on the goal of the row's map."""
    return answer.scores["strict"].success


def draw_picture(samples: list[Sample], answers: dict[str, list[Answer]], path: Path, rows: int = 8) -> None:
    """Map, helper image and the answers of the trained models, side by side."""
    names = ("text", "stage1", "stage2", "stage2_zeroed")
    cell, width = 84, 84 * 2 + 40 + 250 * len(names)
    picture = Image.new("RGB", (width, 30 + (cell + 12) * rows), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(["map", "helper"]):
        draw.text((10 + column * (cell + 10), 8), title, fill="black")
    for column, name in enumerate(names):
        draw.text((200 + 250 * column, 8), LABELS[name].strip(), fill="black")
    for row, sample in enumerate(samples[:rows]):
        top = 30 + row * (cell + 12)
        for column, data in enumerate([sample.input_images[0], sample.helper_images[0]]):
            image = open_image(data, sample.key).convert("RGB").resize((cell, cell))
            picture.paste(image, (10 + column * (cell + 10), top))
        for column, name in enumerate(names):
            answer = answers[name][row]
            latents = "[latent] " * answer.num_latents
            mark = "solved" if solved(answer) else "failed"
            text = f"{latents.strip()}\n{answer.text.strip()[:36]}\n{mark}"
            draw.text((200 + 250 * column, top + 20), text, fill="darkgreen" if solved(answer) else "firebrick")
    picture.save(path)


def main(
    output: Annotated[Path, typer.Option(help="New folder for everything that the demo makes.")] = Path("runs/demo"),
    short: Annotated[bool, typer.Option("--short", help="A few steps of everything, to see that it runs.")] = False,
) -> None:
    """Runs the demo."""
    if output.exists():
        raise SystemExit(f"the folder is there already ({output}); the demo needs a new one; delete it or set --output")
    # Two ranks on a few cores: more threads than cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    transformers_logging.disable_progress_bar()
    Demo(output, SHORT if short else FULL).run()


if __name__ == "__main__":
    typer.run(main)
