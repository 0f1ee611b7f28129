"""Evaluation in training: the ranks answer questions with the weights of a step, and share the work.

The weights are gathered once for all questions; from then on every rank decodes its own batches, without a collective,
so answers may differ in length. The files are those of `mirage evaluate`: RUN/evaluations/step_N.jsonl.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirage_ds.config import Config
from mirage_ds.data.encode import Encoder
from mirage_ds.errors import DataError, MirageError
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.arms import OWN, Arm, parse_arms
from mirage_ds.evaluation.engine import Engine, Ranks
from mirage_ds.evaluation.parts import Parts
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import Task, check_rows, load_task
from mirage_ds.evaluation.tables import summary_of
from mirage_ds.evaluation.training_rows import read_some
from mirage_ds.housekeeping import warn_once
from mirage_ds.inference.generate import Decoder
from mirage_ds.model.backbone import Backbone
from mirage_ds.train_state import TrainState
from mirage_ds.training.after_step import Action
from mirage_ds.training.start import make_encoder
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.whole_model import whole_model

FOLDER = "evaluations"
Wait = Callable[[], None]


@dataclass(frozen=True)
class Questions:
    """What is asked in every evaluation of a run."""

    task: Task
    arms: Sequence[Arm]
    rows: Sequence[Row]
    encoder: Encoder  # of stage 1, which encodes helper images too


def read_evaluation(config: Config) -> Questions | None:
    """The run's questions; None if it evaluates nothing. To be called before the model is loaded.

    Raises:
        MirageError: the task or an arm is unknown, or a row cannot be asked.
    """
    evaluation = config.evaluation
    if evaluation.task is None:
        return None
    task, arms = load_task(evaluation.task), parse_arms(evaluation.latents)
    rows = read_some(evaluation, arms)
    unscored = check_rows(rows, task)
    for row, reason in unscored if distributed.is_main() else ():
        print(f"not scored: {row.where}: {reason}", flush=True)
    return Questions(task, arms, rows, make_encoder(config, "stage1"))


@dataclass(frozen=True)
class InTraining:
    """A run's evaluations. All ranks call it together."""

    trainer: Trainer
    backbone: Backbone  # whose modules the trainer's engine has sharded
    questions: Questions
    config: Config

    def __call__(self, step: int) -> None:
        """Evaluates the weights after `step`, and reports it."""
        began_s = time.monotonic()
        output = self.config.run.dir / FOLDER / f"step_{step}.jsonl"
        answers: dict[str, list[Answer]] = {}
        fault = together(lambda wait: answers.update(self.answer(step, output, wait)), self.trainer.device)
        if isinstance(fault, MirageError):
            self.trainer.agree_on_fault(DataError(f"the evaluation after step {step} failed: {fault}"))
        elif fault is not None:
            warn_once(f"no evaluation after step {step} ({output}): {fault}; the run continues; free some space")
        elif distributed.is_main():
            seconds = time.monotonic() - began_s
            self.trainer.metrics.add_evaluation(step, numbers(answers, self.questions.task) | {"seconds": seconds})
            self.warn_of_timeout(seconds)

    def answer(self, step: int, output: Path, wait: Wait) -> dict[str, list[Answer]]:
        """Writes the answers to all questions and what follows from them; returns them by arm, on rank 0 alone."""
        results = None
        if distributed.is_main():
            forget(output)
            results = Results(output)
        wait()  # every rank finds an empty folder
        parts = self.decode(step, Path(f"{output}.parts"), wait)
        if results is None:
            return {}
        answers = by_arm(parts.answers(), self.questions.arms)
        every = [answer for arm in answers.values() for answer in arm]
        with results:
            results.finish(every, summary_of(answers, self.questions.task) | {"settings": self.settings(step)})
        parts.remove()
        return answers

    def decode(self, step: int, folder: Path, wait: Wait) -> Parts:
        """Fills the parts, which are closed and complete on every rank."""
        questions, evaluation = self.questions, self.config.evaluation
        parts = Parts(folder, distributed.rank(), self.settings(step), self.backbone.embed_tokens.embedding_dim)
        wait()  # nobody gathers while another rank has failed
        with closing(parts), decoding(self.trainer.engine.module, self.backbone):
            decoder = Decoder(
                self.backbone,
                questions.encoder.ids,
                self.config.model.latent_size,
                max_new_tokens=evaluation.max_new_tokens,
            )
            engine = Engine(
                decoder,
                questions.encoder,
                questions.rows,
                questions.task,
                questions.arms,
                batch_size=evaluation.batch_size,
                seed=self.config.run.seed,
            )
            engine.run(parts, Ranks(distributed.rank(), distributed.world_size(), wait))
        wait()  # nobody has a file open in a folder that is removed
        return parts

    def settings(self, step: int) -> dict[str, Any]:
        """What decided the answers, for the summary."""
        evaluation = self.config.evaluation.model_dump(mode="json", exclude={"shards", "interval", "max_samples"})
        settings = {"step": step, "latent_size": self.config.model.latent_size, "seed": self.config.run.seed}
        return evaluation | settings | {"computed": self.backbone.describe()}

    def warn_of_timeout(self, seconds: float) -> None:
        """Ranks that have ended wait for the slowest one, as long as a collective may wait."""
        timeout_s = self.config.distributed.timeout_s
        if seconds > timeout_s / 2:
            warn_once(
                f"an evaluation took {seconds:.0f} s; a rank that waits distributed.timeout_s={timeout_s} for another "
                "ends the run; set evaluation.max_new_tokens, evaluation.max_rows or evaluation.latents lower, or "
                "distributed.timeout_s higher"
            )


def evaluate_if_due(evaluation: InTraining | None) -> Action:
    """Evaluates every `evaluation.interval` steps and after the last one, if there are questions.

    To be called before a validation, which leaves weights gathered.
    """
    if evaluation is None:
        return lambda state: None
    trainer, interval = evaluation.trainer, evaluation.config.evaluation.interval

    def action(state: TrainState) -> None:
        if state.ends_early:  # the remaining time is for the checkpoint
            return
        if state.step % interval == 0 or state.step == trainer.max_steps:
            trainer.metrics.flush()
            evaluation(state.step)

    return action


@contextmanager
def decoding(module: torch.nn.Module, backbone: Backbone) -> Iterator[None]:
    """Every rank may decode with the backbone, whose modules are those of `module`; training does not notice."""
    device = backbone.device
    with whole_model(module), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            backbone.hf.train()  # a decoder turns that off


class FailedElsewhereError(Exception):
    """Another rank has failed."""


def together(work: Callable[[Wait], None], device: torch.device) -> Exception | None:
    """Does `work` on all ranks, which gets a function that waits for the other ranks; they wait equally often.

    A rank that fails says so where it would have waited next, and the others stop there: none waits for ever.

    Returns:
        The first failure that has a name, of any rank, on every rank.
    """

    def wait(failed: bool = False) -> None:
        if any(distributed.max_over_ranks([failed], device)) and not failed:
            raise FailedElsewhereError

    fault: Exception | None = None
    try:
        work(wait)
        wait()
    except FailedElsewhereError:
        pass
    except (MirageError, OSError) as error:
        fault = error
        wait(failed=True)
    else:
        return None
    return next(each for each in distributed.gather(fault) if each)


def forget(output: Path) -> None:
    """Deletes what an earlier start wrote of this step."""
    output.unlink(missing_ok=True)
    Path(f"{output}.summary.json").unlink(missing_ok=True)
    shutil.rmtree(f"{output}.parts", ignore_errors=True)


def by_arm(answers: Sequence[Answer], arms: Sequence[Arm]) -> dict[str, list[Answer]]:
    """In each arm, in the order of the rows."""
    return {
        arm.name: sorted((each for each in answers if each.arm == arm.name), key=lambda each: each.number)
        for arm in arms
    }


def numbers(answers: dict[str, list[Answer]], task: Task) -> dict[str, float]:
    """The figures of an evaluation: those of the arm `own` by their plain names, others as NAME_ARM."""
    figures = {}
    for name, arm in answers.items():
        suffix = "" if name == OWN else f"_{name}"
        scored = [answer.scores[task.ways[0]].success for answer in arm if answer.scores]
        if scored:
            figures[f"success{suffix}"] = sum(scored) / len(scored)
        figures[f"cut_off{suffix}"] = sum(not answer.complete for answer in arm) / len(arm)
        figures[f"with_blocks{suffix}"] = sum(answer.num_blocks > 0 for answer in arm) / len(arm)
    return figures
