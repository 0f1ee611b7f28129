"""Do the latents matter? Trains a tiny model in several ways, with several seeds, and replaces its latents.

    python -m benchmarks.do_latents_matter --task vsp --seeds 3
    python -m benchmarks.do_latents_matter --task hidden --seeds 3

vsp: shortest paths on 3x3 maps, as in the demo. hidden: the puzzles of `mirage-data make-puzzles`, whose answer is seen
in a picture that the question does not show. The arms, each from the same rows and, with one seed, from the same
random model and with the same order of samples:

text             no latents, as many samples as stage 1 and stage 2 together
text_seconds     no latents, for the seconds that the steps of stage 1 and stage 2 take
latents          stage 1, then stage 2
gray             the same, where every helper image is a gray one
input            the same, where the helper image is the question's own image
unseen_image     the same, where the answer does not see the question's image after its first latent block

A seed sets the model's random weights and the order of the samples; training and test rows are the same for all. Every
model with latents answers the test rows again with its latents replaced (docs/evaluation.md says by what), and after
stage 1 with its own latents and with those of the true helper image, which it was trained to read.

Each arm trains on one rank with one thread, as so small a model gains nothing from more; JOBS arms run at a time. The
time of a step is the one that a tenth of a run's steps undercut, in the seed where it is the least: other work on the
machine hardly changes it. So `text_seconds` is trained last, with as many steps in every seed.

Nothing is done twice: OUTPUT/parts.jsonl has a line for each part that is complete, and a start continues after them. A
part that was interrupted begins again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from benchmarks.latents_table import OWN, Answers, Replaced, arms_table, latents_table, rates
from benchmarks.measuring import cpu_name
from benchmarks.parts_once import Parts
from launch.demo import FULL, GLOBAL_BATCH_SIZE, LATENT_SIZE, MAPS, RECIPES, Size
from launch.local import count_gpus
from mirage_ds import errors, strict_json
from mirage_ds.evaluation.finished import read_results
from mirage_ds.evaluation.rates import num_cut_off
from mirage_ds.paths import expanded
from mirage_ds.versions import versions

LATENTS = "own,none,markers,mean,shuffled,noise:1.0,zeroed,fixed,oracle,first"
STAGE1_LATENTS = "own,oracle"
BATCH_SIZE, MAX_NEW_TOKENS = 50, 32
TaskName = Literal["vsp", "hidden"]


@dataclass(frozen=True)
class Task:
    """What is learnt, and how it is scored."""

    command: tuple[str, ...]  # draws the rows
    scored_as: str
    latent_size: int
    size: Size


TASKS: dict[TaskName, Task] = {
    "vsp": Task(
        ("make-vsp", *MAPS),
        "vsp-spatial-planning",
        LATENT_SIZE,
        FULL,
    ),
    "hidden": Task(
        ("make-puzzles", "--levels", "1"),
        "choice",
        9,
        Size(num_train=5800, num_test=400, stage1_steps=360, stage2_steps=120, warmup_steps=30),
    ),
}
SHORT = Size(num_train=64, num_test=8, stage1_steps=2, stage2_steps=2, warmup_steps=1)

TEXT_ARMS = ("text", "text_seconds")
OVERRIDES = {
    "latents": (),
    "gray": ("data.helper=gray",),
    "input": ("data.helper=input",),
    "unseen_image": ("model.answer_sees_image=false",),
}
"""What an arm with latents sets beyond the recipes."""
SHORT_ARMS = ("latents",)
SHORT_LATENTS = "own,none,oracle"


class Benchmark:
    """All arms of one task in one folder; every part is a command that a user would type."""

    def __init__(self, name: TaskName, folder: Path, *, short: bool, jobs: int) -> None:
        self.task, self.folder = TASKS[name], folder
        self.size = SHORT if short else self.task.size
        self.arms = SHORT_ARMS if short else tuple(OVERRIDES)
        self.latents = SHORT_LATENTS if short else LATENTS
        answering = {"latents": self.latents, "batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS}
        self.parts = Parts(folder, {"task": name, "ranks": 1, "size": asdict(self.size), "answering": answering})
        self.jobs = jobs

    def run(self, num_seeds: int) -> None:
        """Trains and evaluates what is not there yet."""
        rows = self.folder / "rows"
        counts = ("--num-train", self.size.num_train, "--num-test", self.size.num_test)
        self.once("rows", rows, ("mirage-data", *self.task.command, "--output", rows, *counts))
        shards = self.folder / "shards"
        self.once("shards", shards, ("mirage-data", "build", "--input", rows / "train.jsonl", "--output", shards))
        for seed in range(num_seeds):
            model = self.folder / f"seed_{seed}" / "model"
            made = ("--preset", "tiny", "--text", rows / "train.jsonl", "--seed", seed)
            self.once(f"seed {seed}, model", model, ("mirage", "init", *made, "--output", model))
        seeds = range(num_seeds)
        self.together(
            partial(self.run_text, seed, arm, self.size.stage1_steps + self.size.stage2_steps)
            if arm == "text"
            else partial(self.run_latents, seed, arm)
            for seed, arm in product(seeds, ("text", *self.arms))
        )
        steps = self.steps_of_equal_seconds(num_seeds)
        self.together(partial(self.run_text, seed, "text_seconds", steps) for seed in seeds)

    def together(self, chains: Iterable[Callable[[], None]]) -> None:
        """Runs chains of parts, JOBS at a time, in their order."""
        with ThreadPoolExecutor(self.jobs) as pool:
            running = [pool.submit(chain) for chain in chains]
            try:
                for chain in as_completed(running):
                    chain.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure no further chain begins

    def run_text(self, seed: int, arm: str, steps: int) -> None:
        self.train(seed, arm, "text", steps)
        self.evaluate(seed, arm, "text", OWN)

    def run_latents(self, seed: int, arm: str) -> None:
        self.train(seed, arm, "stage1", self.size.stage1_steps)
        self.evaluate(seed, arm, "stage1", STAGE1_LATENTS)
        start = f"run.init_from={self.run_of(seed, arm, 'stage1')}"
        self.train(seed, arm, "stage2", self.size.stage2_steps, start)
        self.evaluate(seed, arm, "stage2", self.latents)

    def run_of(self, seed: int, arm: str, stage: str) -> Path:
        return self.folder / f"seed_{seed}" / arm / stage

    def answers_of(self, seed: int, arm: str, stage: str) -> Path:
        return self.run_of(seed, arm, f"{stage}-answers.jsonl")

    def train(self, seed: int, arm: str, stage: str, steps: int, *overrides: str) -> None:
        """Trains one stage of an arm by the demo's recipe."""
        run = self.run_of(seed, arm, stage)
        settings = [
            f"run.dir={run}",
            f"run.seed={seed}",
            f"model.path={self.folder / f'seed_{seed}' / 'model'}",
            f"model.latent_size={self.task.latent_size}",
            f"data.shards={self.folder / 'shards'}",
            "evaluation.shards=null",
            f"train.micro_batch_size_per_gpu={GLOBAL_BATCH_SIZE}",
            f"train.max_steps={steps}",
            f"train.warmup_steps={self.size.warmup_steps}",
            *OVERRIDES.get(arm, ()),
            *overrides,
        ]
        recipe = RECIPES / f"demo-{stage}.yaml"
        command = ("mirage-launch", "local", "--ranks", 1, recipe, *settings)
        self.once(f"seed {seed}, {arm}, {stage}", run, command)

    def evaluate(self, seed: int, arm: str, stage: str, latents: str) -> None:
        """Exports a stage of an arm and answers the test rows, with each replacement."""
        model, answers = self.run_of(seed, arm, f"{stage}-model"), self.answers_of(seed, arm, stage)
        export = ("mirage", "export", "--checkpoint", self.run_of(seed, arm, stage), "--output", model)
        self.once(f"seed {seed}, {arm}, {stage}, export", model, export)
        command = ("mirage", "evaluate", "--model", model, "--task", self.task.scored_as, "--output", answers)
        limits = ("--batch-size", BATCH_SIZE, "--max-new-tokens", MAX_NEW_TOKENS, "--latents", latents)
        data = ("--data", self.folder / "rows" / "test.jsonl")
        self.once(f"seed {seed}, {arm}, {stage}, answers", answers, (*command, *data, *limits))

    def once(self, name: str, output: Path, command: Sequence[object]) -> None:
        """Runs the command of a part that is not complete, after printing it."""

        def action() -> None:
            words = [str(word) for word in command]
            print(f"$ {' '.join(words)}", flush=True)
            program, threads = Path(sys.executable).parent / words[0], {"OMP_NUM_THREADS": "1"}
            code = subprocess.run([program, *words[1:]], env=os.environ | threads).returncode
            if code:
                raise SystemExit(f"`{' '.join(words)}` failed with exit code {code}; its message is above")

        self.parts.once(name, [output, Path(f"{output}.summary.json")], action)

    def step_s(self, num_seeds: int, arm: str, stage: str) -> float:
        """The seconds that a tenth of a run's steps undercut, with the wait for their data; the least of the seeds."""
        return min(float(np.quantile(self.step_seconds(seed, arm, stage), 0.1)) for seed in range(num_seeds))

    def step_seconds(self, seed: int, arm: str, stage: str) -> list[float]:
        lines = (self.run_of(seed, arm, stage) / "metrics.jsonl").read_text().splitlines()
        return [strict_json.loads(line)["step_s"] for line in lines]

    def steps_of_equal_seconds(self, num_seeds: int) -> int:
        """The steps of text that take as long as stage 1 and stage 2, or that an earlier start took for it."""
        if "seed 0, text_seconds, text" in self.parts.done:
            return len(self.step_seconds(0, "text_seconds", "text"))
        return max(1, round(60 * self.minutes(num_seeds, "latents") / self.step_s(num_seeds, "text", "text")))

    def minutes(self, num_seeds: int, arm: str) -> float:
        """What the steps of an arm take."""
        steps = {stage: len(self.step_seconds(0, arm, stage)) for stage in stages_of(arm)}
        return sum(count * self.step_s(num_seeds, arm, stage) for stage, count in steps.items()) / 60

    def training_of(self, num_seeds: int) -> dict[str, dict[str, float]]:
        """Samples and minutes of training of each arm, the same in every seed."""
        return {
            arm: {
                "samples": GLOBAL_BATCH_SIZE * sum(len(self.step_seconds(0, arm, stage)) for stage in stages_of(arm)),
                "minutes": self.minutes(num_seeds, arm),
            }
            for arm in (*TEXT_ARMS, *self.arms)
        }

    def answers(self, num_seeds: int, arms: Sequence[str], stage: str | None = None) -> Answers:
        """What the models answered, by arm and by what was fed at the latents.

        Args:
            stage: after which; by default the last one of each arm.
        """
        found: Answers = {arm: {} for arm in arms}
        for arm, by_latents in found.items():
            for seed in range(num_seeds):
                path = self.answers_of(seed, arm, stage or stages_of(arm)[-1])
                for latents, answers in read_results(path).items():
                    (way, *_) = answers[0].scores
                    replaced = by_latents.setdefault(latents, Replaced())
                    replaced.solved.append([answer.scores[way].success == 1 for answer in answers])
                    replaced.num_cut_off += num_cut_off(answers)
        return found

    def report(self, num_seeds: int) -> None:
        """Prints the tables, and writes the summary."""
        answers, training = self.answers(num_seeds, (*TEXT_ARMS, *self.arms)), self.training_of(num_seeds)
        stage1 = self.answers(num_seeds, self.arms, "stage1")
        parts = list(self.parts.done.values())
        summary = {
            "settings": json.loads((self.folder / "settings.json").read_text()),
            "num_seeds": num_seeds,
            "machine": cpu_name(),
            "jobs": self.jobs,
            "versions": versions(),
            "hours": sum(part["seconds"] for part in parts) / 3600,  # of all parts, JOBS of which ran at a time
            "training": training,
            "rates": rates(answers),
            "rates_after_stage1": rates(stage1),
            "num_cut_off": {
                arm: {latents: replaced.num_cut_off for latents, replaced in by_latents.items()}
                for arm, by_latents in answers.items()
            },
            "parts": parts,
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print("\n".join(["", *arms_table(answers, training), "", *latents_table(answers, stage1)]))
        commits, days = ({part[key] for part in parts} for key in ("commit", "date"))
        hours = f"{summary['hours']:.1f} hours of parts, {self.jobs} at a time"
        print(f"\n{hours}, on {cpu_name()}, {', '.join(sorted(days))}, {', '.join(sorted(commits))}")


def stages_of(arm: str) -> tuple[str, ...]:
    """The runs of an arm, one after the other."""
    return ("text",) if arm in TEXT_ARMS else ("stage1", "stage2")


@expanded()
def main(
    task: Annotated[TaskName, typer.Option(help="What is learnt.")] = "vsp",
    seeds: Annotated[int, typer.Option(min=1, help="Models that are trained in each way.")] = 3,
    output: Annotated[
        Path | None, typer.Option(show_default="runs/do-latents-matter-TASK", help="A folder; a start continues there.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, show_default="1 with a GPU, else one per core", help="Arms at a time.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="A few steps of fewer arms, to check that it runs.")] = False,
) -> None:
    """Trains every arm that is not there yet, and prints what came out."""
    jobs = jobs or (1 if count_gpus() else len(os.sched_getaffinity(0)))
    benchmark = Benchmark(task, output or Path("runs") / f"do-latents-matter-{task}", short=short, jobs=jobs)
    benchmark.run(seeds)
    benchmark.report(seeds)


if __name__ == "__main__":
    errors.run(lambda: typer.run(main))
