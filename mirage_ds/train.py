"""Trains one run. Started by a launcher, or alone as one process:

deepspeed --num_accelerators 2 --module mirage_ds.train RECIPE [section.key=value ...]
torchrun --nproc-per-node 2 --module mirage_ds.train RECIPE [section.key=value ...]
srun --kill-on-bad-exit=1 python -m mirage_ds.train RECIPE [section.key=value ...]
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from mirage_ds.training import early_end

    early_end.listen()  # a signal during the imports must not end the run unsaved

    from mirage_ds import console, library_noise
    from mirage_ds.early_checks import read_command_line
    from mirage_ds.training import allocator
    from mirage_ds.versions import leave_if_unsuitable

    console.keep_going()
    leave_if_unsuitable()  # another version may lack what the imports name
    command_line = read_command_line()
    library_noise.silence()
    allocator.grow_segments()

import faulthandler
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from transformers.utils import logging as transformers_logging

from mirage_ds.checkpoint.base import check_base, describe_base
from mirage_ds.checkpoint.copies import Copies
from mirage_ds.checkpoint.find import require_latest
from mirage_ds.checkpoint.load import load_weights, resume
from mirage_ds.checkpoint.save import Saves, check_room, own_bytes
from mirage_ds.checkpoint.writer import Writer, with_memory
from mirage_ds.config import Config
from mirage_ds.data.target_cache import TargetCaches
from mirage_ds.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    DiskFullError,
    MemoryFullError,
    MirageError,
    TrainingError,
    leave,
    name_full_disk,
)
from mirage_ds.evaluation.training.evaluations import InTraining, evaluate_if_due, open_evaluation
from mirage_ds.evaluation.training.questions import read_evaluation
from mirage_ds.model.backbone import DTYPES, Backbone, check_latent_ids, load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.trained import choose_trained
from mirage_ds.owner import Owner
from mirage_ds.self_check import check_training
from mirage_ds.train_state import TrainState
from mirage_ds.training import early_end, lost_peer
from mirage_ds.training.after_step import profiler, save_if_due, save_if_ended, validate_if_due
from mirage_ds.training.cached_targets import open_target_cache
from mirage_ds.training.described import describe
from mirage_ds.training.dry_run import dry_run
from mirage_ds.training.heartbeat import Heartbeat
from mirage_ds.training.latent_sums import LatentSums
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.planned import plan
from mirage_ds.training.run_data import deal_steps, open_stream
from mirage_ds.training.run_folder import own, write_folder
from mirage_ds.training.set_losses import SetLosses
from mirage_ds.training.start import Start, prepare
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import (
    describe_gather,
    initialize,
    mark_gather_units,
    parameter_groups,
)


def train(config: Config) -> None:
    """The run, from configuration to last checkpoint."""
    writer = Writer() if config.checkpoint.in_background else None  # a fork, before this process has threads or a GPU
    prepare_torch(config)
    check_training()
    start = prepare(config)
    config = start.config
    if start.is_finished:
        end_finished(config, start)
        return
    config.check_packing(distributed.world_size())
    questions = read_evaluation(config)
    with own(config.run.dir, start.tags) as owner:
        engine, backbone = load_engine(config, start)
        base = describe_base(engine.module, config)
        state = load_state(engine, config, start.checkpoint, base)
        copies = open_copies(config)
        saves = open_saves(engine, config, start.facts | base, writer, copies)
        targets = open_target_cache(engine, config, start)
        trainer = make_trainer(engine, config, start, state, saves, targets)
        evaluation = open_evaluation(trainer, backbone, questions, config, start)
        dry_run(trainer, config, start)
        if evaluation is not None:
            evaluation.rehearse()
        train_steps(trainer, config, start, saves, owner, evaluation)
        end(trainer, config)
        if copies is not None:
            copies.wait()


def load_engine(config: Config, start: Start) -> tuple[DeepSpeedEngine, Backbone]:
    """The model under ZeRO-3, and its modules as transformers has them. From here on the run writes into its folder."""
    backbone = load_backbone(
        config.model.path,
        dtype=DTYPES[config.train.dtype],
        device_type=start.device.type,
        attention=config.model.attention,
        cache_dir=config.model.cache_dir,
        deepspeed_config=start.deepspeed_config,
    )
    check_latent_ids(start.encoder.ids, backbone, config.model.path)
    choose_trained(backbone, config.model, start.encoder.ids.latents, config.run.seed)
    model = make_model(config, backbone)
    check_room(config.run.dir, model, start.device)
    write_folder(config, start.facts, start.began)
    mark_gather_units(model, config)
    groups = parameter_groups(model, config.train.weight_decay)
    engine = initialize(model, groups, config.train, start.deepspeed_config)
    if distributed.is_main():
        print(describe(config, start, model, backbone))
        print(describe_gather(model, start.gather, start.deepspeed_config, DTYPES[config.train.dtype]))
        print(start.pooling, flush=True)
    return engine, backbone


def make_trainer(
    engine: DeepSpeedEngine,
    config: Config,
    start: Start,
    state: TrainState,
    saves: Saves,
    targets: TargetCaches | None,
) -> Trainer:
    """The training loop from `state` on, with this rank's data and the run's metrics."""
    latents = None
    if config.train.stage != "text":
        size = engine.module.embed_tokens.embedding_dim
        latents = LatentSums(config.model.latent_size, size, start.device)
        engine.module.keep_states = latents.add
    sets = None
    if len(start.shards.folders) > 1:
        sets = SetLosses(start.shards.names, start.device)
        engine.module.keep_losses = sets.add
    metrics = Metrics(
        config.run.dir,
        stage=config.train.stage,
        global_batch_size=config.train.samples_per_step(distributed.world_size()),
        max_steps=start.max_steps,
        log_freq=config.train.log_freq,
        steps_done=state.step,
        planned=plan(config, start.deepspeed_config),
        latents=latents,
        sets=sets,
    )
    metrics.show_configuration(config.model_dump(mode="json"))
    steps = deal_steps(config, start, state.position)
    trainer = Trainer(
        engine,
        open_stream(config, start, steps, targets),
        steps,
        config.train,
        metrics,
        state,
        max_steps=start.max_steps,
        device=start.device,
        agree_on_passes=start.gather != "rollout" and config.several_passes,
        early_end=watch_end(config),
        save_progress=saves.progress,
    )
    trainer.clock.watch(engine.module.tower, "tower")
    if start.gather == "rollout":
        trainer.clock.watch(engine.module.rollout, "rollout")
    return trainer


def train_steps(
    trainer: Trainer,
    config: Config,
    start: Start,
    saves: Saves,
    owner: Owner | None,
    evaluation: InTraining | None,
) -> None:
    """All steps that are left, with what is due after each of them."""
    beating = Heartbeat(config.run.dir, distributed.rank(), config.distributed.timeout_s, trainer.state.step)
    with beating as heartbeat, profiler(config, trainer.state) as profile_step:
        actions = [
            lambda state: heartbeat.beat(state.step),
            lambda state: owner.check(state.step) if owner else None,
            save_if_due(trainer, config.checkpoint.interval, saves),  # what follows may fail, or take long
            evaluate_if_due(evaluation),  # before a validation, which leaves weights gathered
            validate_if_due(trainer, config, start.encoder),
            save_if_ended(trainer, saves),
            profile_step,
        ]
        try:
            trainer.train(after_step=actions)
        except TrainingError as error:  # which all ranks have: the steps before it stay saved
            try:
                saves.finish()
            except CheckpointError as lost:
                raise TrainingError(f"{error}; besides, {lost}") from lost
            raise
    early_end.ignore()


def end(trainer: Trainer, config: Config) -> None:
    """After the last checkpoint: says whether steps are left, and leaves the process group."""
    trainer.metrics.close()
    step = trainer.state.step
    if distributed.is_main() and step < trainer.max_steps:
        early_end.mark(config.run.dir, step)
        print(f"stopped after step {step} of {trainer.max_steps}; continue with run.resume=auto", flush=True)
    distributed.shut_down()


def end_finished(config: Config, start: Start) -> None:
    """A finished run was started again: says so, and changes nothing."""
    if distributed.is_main():
        run = config.run.dir
        print(
            f"finished already: step {start.max_steps} of {start.max_steps} is saved in {start.checkpoint}\n"
            f"to export the model: mirage export --checkpoint {run} --output DIR\n"
            "to train longer: run.resume=extend with a larger train.max_steps or train.epochs; or a new run from these "
            f"weights, with run.init_from={run} and another run.dir",
            flush=True,
        )
    distributed.shut_down()


def open_copies(config: Config) -> Copies | None:
    """Copies this run's checkpoints to `checkpoint.copy_to`, if that is set; on rank 0 alone."""
    if config.checkpoint.copy_to is None or not distributed.is_main():
        return None
    name = config.run.dir.absolute().name
    return Copies(config.checkpoint.copy_to / name, config.checkpoint.keep_latest_k)


def open_saves(
    engine: DeepSpeedEngine, config: Config, facts: dict[str, Any], writer: Writer | None, copies: Copies | None
) -> Saves:
    """This run's checkpoints, written in the background if there is memory for it."""
    if writer is not None:
        writer = with_memory(writer, own_bytes(engine.module))
    return Saves(engine, config, facts, writer=writer, copies=copies)


def make_model(config: Config, backbone: Backbone) -> MirageModel:
    """The method's losses on top of a backbone."""
    return MirageModel(
        backbone,
        stage=config.train.stage,
        ce_loss_weight=config.train.text_weight,
        latent_loss_weight=config.train.latent_loss_weight,
        recompute=config.model.activation_checkpointing == "full",
        train_tower=config.model.trains_vision,
        compress_strategy=config.model.compress_strategy,
    )


def prepare_torch(config: Config) -> None:
    """Seeds, and on request only deterministic kernels."""
    torch.manual_seed(config.run.seed)
    if config.train.deterministic:
        # cuBLAS reads it when it starts; https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # transformers' FlashAttention reads this variable and does not ask torch
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)
        # torch then also fills every new tensor with NaN, such as ZeRO-3's large buffers, which are overwritten anyway.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load_state(engine: DeepSpeedEngine, config: Config, checkpoint: Path | None, base: dict[str, Any]) -> TrainState:
    """Loads the run's own checkpoint, or at its start the weights of `run.init_from`; returns the position.

    Args:
        base: of an adapter, as `describe_base` found it.
    """
    if checkpoint is not None:
        check_base(checkpoint, base)
        if distributed.is_main():
            print(f"Resuming from {checkpoint}", flush=True)
        return resume(engine, checkpoint)
    if config.run.init_from:
        check_base(require_latest(config.run.init_from), base)
        load_weights(engine, config.run.init_from)
    return TrainState()


def watch_end(config: Config) -> early_end.EarlyEnd:
    """Ends the run before its last step: signals on every rank, and on rank 0 the job's time limit."""
    end_s = early_end.job_end_s(say=print) if distributed.is_main() else None
    return early_end.EarlyEnd(end_s, config.run.save_before_end_s, config.distributed.timeout_s)


def run(config: Config) -> None:
    """Trains. A user's mistake is one message and exit code 2; a bug keeps its traceback."""
    faulthandler.enable()  # NCCL ends a rank whose collective times out by SIGABRT; this shows where the rank waited
    transformers_logging.disable_progress_bar()
    try:
        with name_full_disk(config.run.dir, "free some space, and start again, with run.resume=auto if a run is there"):
            train(config)
    except MirageError as error:
        # All ranks have the same configuration; bad data, a missing GPU, a full disk or memory may be one rank's alone.
        alone = isinstance(error, DeviceError) or (
            isinstance(error, (DataError, DiskFullError, MemoryFullError)) and torch.distributed.is_initialized()
        )
        leave(error, every_rank=alone)
    except RuntimeError as error:
        if not lost_peer.is_lost_peer(error):
            raise
        lost_peer.leave(error)


if __name__ == "__main__":
    run(command_line)
