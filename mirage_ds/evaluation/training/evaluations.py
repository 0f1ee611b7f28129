"""Evaluation in training: the ranks answer questions with the weights of a step, and share the work.

The weights are gathered once for all questions; from then on every rank decodes its own batches, without a collective,
so answers may differ in length. The files are those of `mirage evaluate`: RUN/evaluations/step_N.jsonl.
"""

import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from mirage_ds.config import Config
from mirage_ds.errors import EvaluationError, MirageError
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.parts import Parts, check_settings
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.evaluation.results import Results, parts_of
from mirage_ds.evaluation.scoring import score_share, scored
from mirage_ds.evaluation.settings import digest_of_rows
from mirage_ds.evaluation.tables import summary_of, warnings_of
from mirage_ds.evaluation.training.figures import numbers, spread_of
from mirage_ds.evaluation.training.looks import looks
from mirage_ds.evaluation.training.memory import (
    decoding,
    describe_evaluation,
    describe_rehearsal,
    name_full_memory,
)
from mirage_ds.evaluation.training.questions import Questions
from mirage_ds.evaluation.training.together import AskedToEndError, FailedError, Gather, leave_if_asked, together
from mirage_ds.housekeeping import warn_once
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.sampling import GREEDY
from mirage_ds.model.backbone import Backbone
from mirage_ds.train_state import TrainState
from mirage_ds.training.after_step import Action
from mirage_ds.training.report import Evaluated
from mirage_ds.training.start import Start
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import future_moments

FOLDER = "evaluations"


@dataclass(frozen=True)
class InTraining:
    """A run's evaluations. All ranks call it together."""

    trainer: Trainer
    backbone: Backbone  # whose modules the trainer's engine has sharded
    questions: Questions
    config: Config
    seconds: list[float] = field(default_factory=list)  # that each evaluation of this start took

    def __call__(self, step: int) -> None:
        """Evaluates the weights after `step`, and reports it."""
        if not self.has_time(step):
            return
        began_s = time.monotonic()
        output = self.config.run.dir / FOLDER / f"step_{step}.jsonl"
        try:
            evaluated = together(lambda gather: self.evaluate(step, output, gather))
        except FailedError as failed:
            self.fail(step, output, failed.fault)
            return
        seconds = time.monotonic() - began_s
        self.seconds.append(seconds)
        if evaluated is not None:
            self.trainer.metrics.add_evaluation(step, evaluated, seconds)
            self.warn_of_timeout(seconds)

    def rehearse(self) -> None:
        """Takes the memory of decoding before the run's first step, beside that of the optimizer; on every rank.

        Raises:
            MemoryFullError: there is too little, maybe on this rank alone.
        """
        get_accelerator().reset_peak_memory_stats()
        with name_full_memory(self.config.evaluation), decoding(self.trainer.engine.module, self.backbone):
            moments = future_moments(self.trainer.engine)
            size = self.engine().rehearse()
        del moments
        if distributed.is_main():
            print(describe_rehearsal(*size, self.trainer.device), flush=True)
        get_accelerator().reset_peak_memory_stats()

    def has_time(self, step: int) -> bool:
        """Whether an evaluation as long as the longest so far ends before the job; all ranks agree."""
        longest_s = max(self.seconds, default=0.0)
        is_short = not self.trainer.early_end.has_time(longest_s)
        if not any(distributed.max_over_ranks([is_short], self.trainer.device)):
            return True
        if distributed.is_main():
            print(
                f"no evaluation after step {step}: the job ends before (the longest took {longest_s:.0f} s)", flush=True
            )
        return False

    def fail(self, step: int, output: Path, fault: Exception) -> None:
        """The run saves and ends; a full disk, or the wish to end, ends the evaluation alone."""
        if isinstance(fault, AskedToEndError):
            if distributed.is_main():
                forget(output)
                print(f"no evaluation after step {step}: the run is asked to end", flush=True)
        elif isinstance(fault, MirageError):
            if distributed.is_main():
                forget(output)
            self.trainer.agree_on_fault(EvaluationError(f"the evaluation after step {step} failed: {fault}"))
        elif distributed.is_main():
            warn_once(f"no evaluation after step {step} ({output}): {fault}; the run continues; free some space")

    def evaluate(self, step: int, output: Path, gather: Gather) -> Evaluated | None:
        """Writes the answers to all questions and what follows from them; returns what is reported, on rank 0 alone."""
        ranks = Ranks(distributed.rank(), distributed.world_size(), gather)
        settings, evaluated, results = self.settings(step), None, None
        if ranks.is_first:
            forget(output)
            results = Results(output)
            check_settings(results.parts, settings)
        ranks.wait()  # every rank finds an empty folder
        parts = Parts(parts_of(output), ranks.rank, self.backbone.embed_tokens.embedding_dim)
        ranks.wait()  # nobody gathers while another rank has failed
        module = self.trainer.engine.module
        with closing(parts), name_full_memory(self.config.evaluation), decoding(module, self.backbone):
            engine = self.engine()
            engine.run(parts, ranks, leave_if_asked)
            decoded = engine.in_order(parts.answers())
            shares = ranks.gather(score_share(decoded, engine.rows, self.questions.task, ranks, leave_if_asked))
            if results is not None:
                answers = scored(decoded, shares)
                states = parts.states()
                health = engine.health(states, answers[OWN])
                evaluated = Evaluated(
                    numbers(answers, self.questions.task),
                    spread_of(health),
                    looks(engine, answers[OWN], states),
                    health.warning(),
                    warnings_of(answers),
                )
        ranks.wait()  # nobody has a file open in a folder that is removed
        if results is not None:
            summary = summary_of(answers, self.questions.task) | {"health": health.as_dict(), "settings": settings}
            with results:
                results.finish([answer for arm in answers.values() for answer in arm], summary)
        return evaluated

    def engine(self) -> Engine:
        """What decodes with the weights of now."""
        questions, evaluation = self.questions, self.config.evaluation
        decoder = Decoder(
            self.backbone,
            questions.encoder.ids,
            self.config.model.latent_size,
            max_new_tokens=evaluation.max_new_tokens,
            answer_sees_image=self.config.model.answer_sees_image,
        )
        return Engine(
            decoder,
            questions.encoder,
            questions.rows,
            questions.arms,
            batch_size=evaluation.batch_size,
            seed=self.config.run.seed,
        )

    def settings(self, step: int) -> dict[str, Any]:
        """What decided the answers, for the summary."""
        left_out = {"shards", "interval", "max_samples", "rows"}
        evaluation = self.config.evaluation.model_dump(mode="json", exclude=left_out)
        greedy = asdict(GREEDY) | {"latent_end": Decoder.latent_end, "samples": Engine.samples}
        settings = {"step": step, "latent_size": self.config.model.latent_size, "seed": self.config.run.seed}
        data = {"data": str(self.config.evaluation.rows), **self.digests}
        return evaluation | greedy | settings | data | {"computed": self.backbone.describe()}

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """Of the rows, by which `mirage compare` knows the same ones, and of the task."""
        return {"task_file": self.questions.task.file_digest} | digest_of_rows(self.questions.rows)

    def warn_of_timeout(self, seconds: float) -> None:
        """Ranks that have ended wait for the slowest one, as long as a collective may wait."""
        timeout_s = self.config.distributed.timeout_s
        if seconds > timeout_s / 2:
            warn_once(
                f"an evaluation took {seconds:.0f} s; a rank that waits distributed.timeout_s={timeout_s} for another "
                "ends the run; set evaluation.max_new_tokens, evaluation.max_rows or evaluation.latents lower, or "
                "distributed.timeout_s higher"
            )


def open_evaluation(
    trainer: Trainer, backbone: Backbone, questions: Questions | None, config: Config, start: Start
) -> InTraining | None:
    """What answers questions while the run trains, if there are questions."""
    if questions is None:
        return None
    described = describe_evaluation(config, start, questions)
    if distributed.is_main():
        print(described, flush=True)
    return InTraining(trainer, backbone, questions, config)


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


def forget(output: Path) -> None:
    """Deletes what an earlier start wrote of this step."""
    output.unlink(missing_ok=True)
    Path(f"{output}.summary.json").unlink(missing_ok=True)
    shutil.rmtree(parts_of(output), ignore_errors=True)
