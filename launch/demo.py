"""All of mirage_ds on one machine: draws maps, builds shards, trains a tiny model three ways, evaluates and compares.

    make demo        or        python -m launch.demo [--output runs/demo] [--short]

A model of a million parameters learns to find the shortest path on 3x3 maps. Stage 1 and stage 2 together see as many
samples as the text baseline. The score is the share of held-out maps (no training row has them) that are solved, with
greedy decoding and strictly parsed moves. The models with latents are scored again with their latents replaced.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launch.demo_report import LABELS, conclusions, count_malformed, draw_picture, rate, results_table
from launch.local import count_gpus
from mirage_ds import errors
from mirage_ds.cli import app as mirage
from mirage_ds.data.rows import read_rows
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.finished import read_results
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.paths import expanded

RECIPES = Path(__file__).parent / "recipes"
RANKS, LATENT_SIZE = 2, 4
GLOBAL_BATCH_SIZE = 64
RUNS = ("untrained", "text", "stage1", "stage2")
MAPS = ("--levels", "3", "--cell-px", "28", "--prompt", "short")
LATENTS = {"stage1": "own,oracle", "stage2": "own,shuffled,mean,noise:1.0,zeroed,oracle"}  # fed to these models
BATCH_SIZE, MAX_NEW_TOKENS = 50, 24


@dataclass(frozen=True)
class Size:
    """How much data, and how many steps."""

    num_train: int
    num_test: int
    stage1_steps: int
    stage2_steps: int
    warmup_steps: int


FULL = Size(num_train=5800, num_test=400, stage1_steps=260, stage2_steps=400, warmup_steps=30)
SHORT = Size(num_train=128, num_test=16, stage1_steps=4, stage2_steps=4, warmup_steps=1)


class Demo:
    """One demo in one folder; every step but the last is a command that a user would type."""

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

    def show(self, command: Sequence[object]) -> list[str]:
        """Prints a command as a user would type it; returns its words."""
        words = [str(word) for word in command]
        self.console.print(f"$ {' '.join(words)}", style="bold", highlight=False, soft_wrap=True)
        return words

    @contextmanager
    def commands(self, *commands: Sequence[object]) -> Iterator[None]:
        """Starts commands, all at the same time, and waits for them at the end; none may need another's output."""
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for command in commands:
                name, *arguments = words = self.show(command)
                running[" ".join(words)] = subprocess.Popen([str(Path(sys.executable).parent / name), *arguments])
            yield
            for line, process in running.items():
                if code := process.wait():
                    raise SystemExit(f"`{line}` failed with exit code {code}; its message is above")
        finally:
            for process in running.values():
                process.terminate()
                process.wait()

    def mirage(self, *arguments: object) -> None:
        """Runs the command `mirage` in this process, which then loads torch and transformers once for all of them."""
        mirage(self.show(("mirage", *arguments))[1:], standalone_mode=False)

    def make_maps(self) -> None:
        rows = self.output / "rows"
        counts = ("--num-train", self.size.num_train, "--num-test", self.size.num_test)
        with self.commands(("mirage-data", "make-vsp", "--output", rows, *counts, *MAPS)):
            pass

    def make_inputs(self) -> None:
        """Shards, and a model that has the words of the rows."""
        rows = self.output / "rows"
        builds = [
            ("mirage-data", "build", "--input", rows / f"{part}.jsonl", "--output", self.output / part)
            for part in ("train", "test")
        ]
        with self.commands(*builds):
            text = rows / "train.jsonl"
            self.mirage("init", "--preset", "tiny", "--text", text, "--output", self.output / "model")

    def train(self, stage: str, steps: int) -> None:
        ranks = min(RANKS, count_gpus()) or RANKS
        start = [f"run.init_from={self.output / 'stage1'}"] if stage == "stage2" else []
        recipe = RECIPES / f"demo-{stage}.yaml"
        overrides = [
            f"run.dir={self.output / stage}",
            f"model.path={self.output / 'model'}",
            f"data.shards={self.output / 'train'}",
            f"evaluation.shards={self.output / 'test'}",
            f"train.micro_batch_size_per_gpu={GLOBAL_BATCH_SIZE // ranks}",
            f"train.max_steps={steps}",
            f"train.warmup_steps={self.size.warmup_steps}",
            *start,
        ]
        with self.commands(("mirage-launch", "local", "--ranks", ranks, recipe, *overrides)):
            pass

    def test(self) -> dict[str, list[Answer]]:
        """The answers of every model to the held-out maps, with each replacement of its latents."""
        answers = {}
        for run in RUNS:
            output = self.output / f"{run}-answers.jsonl"
            what = ("--model", self.trained(run), "--task", "vsp-spatial-planning", "--latents", LATENTS.get(run, OWN))
            limits = ("--latent-size", LATENT_SIZE, "--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", BATCH_SIZE)
            self.mirage("evaluate", *what, "--data", self.output / "rows" / "test.jsonl", "--output", output, *limits)
            for arm, found in read_results(output).items():
                answers[run if arm == OWN else f"{run}_{arm.partition(':')[0]}"] = found
        return answers

    def trained(self, run: str) -> Path:
        """The folder of a run's exported model, or of the model that all runs start from."""
        return self.output / ("model" if run == "untrained" else f"{run}-model")

    def export(self) -> None:
        for run in RUNS[1:]:
            self.mirage("export", "--checkpoint", self.output / run, "--output", self.trained(run))

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
        steps = {name: {"untrained": 0, "stage1": stage1}.get(name.partition("_")[0], both) for name in LABELS}
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


@expanded()
def main(
    output: Annotated[Path, typer.Option(help="New folder for everything that the demo writes.")] = Path("runs/demo"),
    short: Annotated[bool, typer.Option("--short", help="A few steps of each part, to check that it runs.")] = False,
) -> None:
    """Runs the demo."""
    if output.exists():
        raise SystemExit(f"the folder exists already ({output}); the demo needs a new one; delete it, or set --output")
    Demo(output, SHORT if short else FULL).run()


if __name__ == "__main__":
    errors.run(lambda: typer.run(main))
