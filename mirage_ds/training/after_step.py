"""Actions after an optimizer step: validate, save, trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch

from mirage_ds.checkpoint.save import Progress, Saves
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.places import Reading
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.spread import spread
from mirage_ds.data.stream import SampleReader, encode_read, first_usable
from mirage_ds.housekeeping import housekeeping
from mirage_ds.train_state import TrainState
from mirage_ds.training.trainer import Trainer
from mirage_ds.training.validation import Validation
from mirage_ds.zero3 import distributed

Action = Callable[[TrainState], None]


def validate_if_due(trainer: Trainer, config: Config, encoder: Encoder) -> Action:
    """Validates every `evaluation.interval` steps and after the last one, if there is a folder to validate on."""
    if config.evaluation.shards is None:
        return lambda state: None
    shards, interval = load_manifest(config.evaluation.shards, Reading.of(config.data)), config.evaluation.interval
    read, align = SampleReader(shards, helpers=Helpers.of(config)), config.train.stage == "stage2"

    def usable(number: int) -> EncodedSample:
        following = (later % shards.num_samples for later in count(number))
        return first_usable(partial(encode_read, encoder, read), following, config.data.on_fault)

    validation = Validation(
        trainer.engine,
        trainer.num_passes,
        trainer.agree_on_fault,
        lambda numbers: collate([usable(number) for number in numbers], align_latents=align),
        spread(shards.num_samples, config.evaluation.max_samples),
        micro_batch_size=config.rows_per_micro_batch,
        device=trainer.device,
    )

    def action(state: TrainState) -> None:
        if state.ends_early:  # the remaining time is for the checkpoint
            return
        if state.step % interval == 0 or state.step == trainer.max_steps:
            trainer.metrics.flush()
            losses = validation.losses()
            if losses is not None:
                trainer.metrics.add_validation(state.step, losses)

    return action


def save_if_due(trainer: Trainer, interval: int, saves: Saves) -> Action:
    """Saves every `interval` steps, if it is not 0, and after the last step of this start, which waits for the save."""

    def action(state: TrainState) -> None:
        last = state.ends_early or state.step == trainer.max_steps
        if last or (interval and state.step % interval == 0):
            trainer.metrics.flush()  # a run that resumes here has all earlier steps in metrics.jsonl
            with trainer.clock.host("save"):
                saves.save(state, wait=last)
        elif saves.under_way and trainer.save_progress != Progress.WRITING:
            with trainer.clock.host("save"):
                saves.finish()

    return action


def save_if_ended(trainer: Trainer, saves: Saves) -> Action:
    """Saves a step that is not saved yet, if a fault since then ends the run: in an evaluation or in a validation."""

    def action(state: TrainState) -> None:
        if state.ends_early and saves.last_step != state.step:
            with trainer.clock.host("save"):
                saves.save(state, wait=True)

    return action


@contextmanager
def profiler(config: Config, state: TrainState) -> Iterator[Action]:
    """Traces the steps of `train.profile_steps` to RUN/profile/rank_N.json, for chrome://tracing or Perfetto."""
    steps = config.train.profile_steps
    if steps is None or state.step >= steps[0]:
        yield lambda state: None
        return
    file = config.run.dir / "profile" / f"rank_{distributed.rank()}.json"

    def write(profile: torch.profiler.profile) -> None:
        with housekeeping(f"the trace was not written ({file})", "trace some steps again"):
            file.parent.mkdir(exist_ok=True)
            file.touch()  # export_chrome_trace only logs that it cannot write
            profile.export_chrome_trace(str(file))

    schedule = torch.profiler.schedule(
        skip_first=steps[0] - 1 - state.step, wait=0, warmup=0, active=steps[1] - steps[0] + 1, repeat=1
    )
    trace = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
    with trace:
        yield lambda state: trace.step()
