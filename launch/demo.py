"""All of mirage_ds on one machine: draws maps, builds shards, trains a tiny model three ways, evaluates and compares.

    make demo        or        python -m launch.demo [--output runs/demo] [--short]

A model of a million parameters learns to find the shortest path on 3x3 maps. Stage 1 and stage 2 together see as many
samples as the text baseline. The score is the share of held-out maps (no training row has them) that are solved, with
greedy decoding and strictly parsed moves. The stage 2 model is scored again with its latents replaced.
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
from rich.console import Console
from transformers.utils import logging as transformers_logging

from launch.demo_report import LABELS, conclusions, count_malformed, draw_picture, rate, results_table
from mirage_ds.config import TaskName
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample, read_rows
from mirage_ds.inference.evaluate import evaluate
from mirage_ds.inference.generate import Decoder, load_decoder
from mirage_ds.inference.latents import Feed, MeanStates, OwnStates, ShuffledStates, next_rows, zeroed
from mirage_ds.inference.questions import read_task
from mirage_ds.inference.results import Answer

RECIPES = Path(__file__).parent / "recipes"
RANKS, LATENT_SIZE, MAX_NEW_TOKENS = 2, 4, 24
GLOBAL_BATCH_SIZE = 64
TASK: TaskName = "vsp-spatial-planning"
RUNS = ("untrained", "text", "stage1", "stage2")
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Size:
    """How much data, and how many steps."""

    num_train: int
    num_test: int
    stage1_steps: int
    stage2_steps: int
    warmup_steps: int


FULL = Size(num_train=5800, num_test=400, stage1_steps=260, stage2_steps=560, warmup_steps=30)
SHORT = Size(num_train=128, num_test=16, stage1_steps=4, stage2_steps=4, warmup_steps=1)


class Demo:
    """One demo in one folder; every step is a command that a user would type."""

    def __init__(self, output: Path, size: Size) -> None:
        self.output, self.size = output, size
        self.console = Console()
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, action: Callable[[], Any]) -> Any:
        """Runs a part under a headline, and records its time."""
        self.console.rule(name)
        started_s = time.monotonic()
        result = action()
        self.seconds[name] = round(time.monotonic() - started_s, 1)
        return result

    def command(self, *arguments: object) -> None:
        """Prints and runs a command; its output goes straight to the terminal."""
        self.side_by_side(arguments)

    def side_by_side(self, *commands: tuple[object, ...]) -> None:
        """Prints commands and runs them at the same time; none may need another's output."""
        running = []
        for command in commands:
            name, *arguments = [str(word) for word in command]
            self.console.print(f"$ {' '.join([name, *arguments])}", style="bold", highlight=False, soft_wrap=True)
            running.append((name, subprocess.Popen([str(Path(sys.executable).parent / name), *arguments])))
        try:
            for name, process in running:
                if code := process.wait():
                    raise SystemExit(f"`{name}` failed with exit code {code}; its message is above")
        finally:
            for _, process in running:
                process.terminate()
                process.wait()

    def make_maps(self) -> None:
        rows = self.output / "rows"
        counts = ("--num-train", self.size.num_train, "--num-test", self.size.num_test)
        shape = ("--levels", "3", "--cell-px", "28", "--prompt", "short")
        self.command("mirage-data", "make-vsp", "--output", rows, *counts, *shape)

    def make_inputs(self) -> None:
        """Shards, and a model that has the words of the rows."""
        rows = self.output / "rows"
        self.side_by_side(
            ("mirage-data", "build", "--input", rows / "train.jsonl", "--output", self.output / "train"),
            ("mirage-data", "build", "--input", rows / "test.jsonl", "--output", self.output / "test"),
            ("mirage", "init", "--preset", "tiny", "--text", rows / "train.jsonl", "--output", self.output / "model"),
        )

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
        """The answers of every model to the held-out maps, then those of the last one with its latents replaced."""
        rows = read_task(self.output / "rows" / "test.jsonl", TASK)
        answers: dict[str, list[Answer]] = {}
        for run in RUNS:
            decoder, encoder = self.load(run)
            own = OwnStates()
            answers[run] = self.decode(run, decoder, encoder, rows, own)
        assert run == "stage2", "decoder and own states are those of the stage 2 model from here on"
        replacements: dict[str, Feed] = {
            "stage2_shuffled": ShuffledStates(own, next_rows(rows, SHUFFLE_SEED)),
            "stage2_mean": MeanStates(own),
            "stage2_zeroed": zeroed,
        }
        for name, feed in replacements.items():
            answers[name] = self.decode(name, decoder, encoder, rows, feed)
        return answers

    def decode(
        self, name: str, decoder: Decoder, encoder: Encoder, rows: list[tuple[str, Sample]], feed: Feed
    ) -> list[Answer]:
        started_s = time.monotonic()
        decoder.feed = feed
        answers = list(evaluate(decoder, encoder, rows, TASK, batch_size=50))
        self.console.print(f"{LABELS[name].strip()}: {time.monotonic() - started_s:.0f} s", highlight=False)
        return answers

    def load(self, run: str) -> tuple[Decoder, Encoder]:
        return load_decoder(
            str(self.trained(run)),
            latent_size=LATENT_SIZE,
            system_turn=False,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=torch.float32,
        )

    def trained(self, run: str) -> Path:
        """The folder of a run's exported model, or of the model that all runs start from."""
        return self.output / ("model" if run == "untrained" else f"{run}-model")

    def export(self) -> None:
        runs = ("text", "stage1", "stage2")
        self.side_by_side(
            *(("mirage", "export", "--checkpoint", self.output / run, "--output", self.trained(run)) for run in runs)
        )

    def run(self) -> None:
        """Runs all parts, and writes the summary and the picture."""
        started_s = time.monotonic()
        size = self.size
        self.timed("Maps", self.make_maps)
        self.timed("Shards, and a tiny random model", self.make_inputs)
        self.timed("Text baseline", lambda: self.train("text", size.stage1_steps + size.stage2_steps))
        self.timed("Stage 1: grounded latents", lambda: self.train("stage1", size.stage1_steps))
        self.timed("Stage 2: free latents", lambda: self.train("stage2", size.stage2_steps))
        self.timed("Models that plain transformers loads", self.export)
        answers = self.timed("Held-out maps", self.test)
        samples = [sample for _, sample in read_rows(self.output / "rows" / "test.jsonl")]
        draw_picture(samples, answers, self.output / "answers.png")
        summary: dict[str, Any] = {f"success_{name}": rate(answers[name]) for name in LABELS}
        summary |= {"malformed": {name: count_malformed(answers[name]) for name in LABELS}}
        summary |= {"num_test": len(samples), "seconds": self.seconds}
        summary["seconds_total"] = round(time.monotonic() - started_s, 1)
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.report(answers)

    def report(self, answers: dict[str, list[Answer]]) -> None:
        """Prints the table, what follows from it, and where everything is."""
        self.console.rule("Results")
        stage1, both = self.size.stage1_steps, self.size.stage1_steps + self.size.stage2_steps
        steps = {name: {"untrained": 0, "stage1": stage1}.get(name, both) for name in LABELS}
        self.console.print(results_table(answers, {name: steps[name] * GLOBAL_BATCH_SIZE for name in LABELS}))
        for sentence in conclusions(answers):
            self.console.print(sentence, highlight=False, soft_wrap=True)
        for part, seconds in self.seconds.items():
            self.console.print(f"{seconds:7.1f} s  {part}", highlight=False)
        self.console.print(
            f"Picture: {self.output / 'answers.png'}   Figures: {self.output / 'summary.json'}\n"
            f"Curves:  tensorboard --logdir {self.output}",
            highlight=False,
        )
        question = json.loads((self.output / "rows" / "test.jsonl").read_text().splitlines()[0])
        self.console.print(
            f"Ask the model:  mirage generate --model {self.trained('stage2')} "
            f"--prompt {shlex.quote(question['text_input'])} "
            f"--image {self.output / 'rows' / question['image_input']}",
            highlight=False,
            soft_wrap=True,
        )


def main(
    output: Annotated[Path, typer.Option(help="New folder for everything that the demo writes.")] = Path("runs/demo"),
    short: Annotated[bool, typer.Option("--short", help="A few steps of each part, to check that it runs.")] = False,
) -> None:
    """Runs the demo."""
    if output.exists():
        raise SystemExit(f"the folder exists already ({output}); the demo needs a new one; delete it, or set --output")
    # With two ranks on a few cores, more threads than cores slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // RANKS)))
    transformers_logging.disable_progress_bar()
    Demo(output, SHORT if short else FULL).run()


if __name__ == "__main__":
    typer.run(main)
