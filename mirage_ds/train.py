"""Trains one run. Started by a launcher, or alone as one process:

deepspeed --num_accelerators 2 --module mirage_ds.train RECIPE [section.key=value ...]
torchrun --nproc-per-node 2 --module mirage_ds.train RECIPE [section.key=value ...]
srun --kill-on-bad-exit=1 python -m mirage_ds.train RECIPE [section.key=value ...]
"""

if __name__ == "__main__":  # before the imports, as another version may lack what they name
    from mirage_ds.versions import leave_if_untested

    leave_if_untested()

    from mirage_ds.training import early_end

    early_end.listen()  # before the imports too: they last for seconds, in which a signal would end the run unsaved

import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from deepspeed import DeepSpeedEngine
from transformers.utils import logging as transformers_logging

from mirage_ds.batch import Batch
from mirage_ds.checkpoint.copies import Copies
from mirage_ds.checkpoint.facts import describe_run
from mirage_ds.checkpoint.find import find_damage, newest_complete, refuse_damaged, require_latest
from mirage_ds.checkpoint.load import check_start, load_weights, resume
from mirage_ds.checkpoint.save import check_room
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import Share, make_loader
from mirage_ds.errors import DataError, DiskFullError, MirageError, leave, name_full_disk
from mirage_ds.model.backbone import DTYPES, Backbone, check_config, check_latent_ids, load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.ops.latent_pool import describe_path
from mirage_ds.recipe import load_config
from mirage_ds.train_state import TrainState
from mirage_ds.training import early_end
from mirage_ds.training.after_step import profiler, save_if_due, validate_if_due
from mirage_ds.training.heartbeat import Heartbeat
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.run_folder import find_start, write_folder
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import (
    choose_gather,
    describe_gather,
    initialize,
    mark_gather_units,
    parameter_groups,
    whole_numel,
)


def train(config: Config) -> None:
    """The whole run, from configuration to last checkpoint."""
    prepare_torch(config)
    deepspeed_config = resolve_deepspeed_config(config)
    shards = load_manifest(config.data.shards)
    check_config(config.model.path, config.model.cache_dir)
    encoder = open_encoder(config)
    device = distributed.init(config.distributed.timeout_s)
    pooling = describe_path(device)
    max_steps = config.train.num_steps(shards.num_samples, distributed.world_size())
    if config.run.init_from and not (config.run.resume == "auto" and newest_complete(config.run.dir)):
        check_start(config.run.init_from, config)
        named = require_latest(config.run.init_from)
        refuse_damaged(named, find_damage(named))
    facts = describe_run(config, deepspeed_config, shards.digest, max_steps)
    found = find_start(config, facts)

    backbone = load_backbone(
        config.model.path,
        dtype=DTYPES[config.train.dtype],
        attention=config.model.attention,
        train_tower=config.model.train_tower,
        cache_dir=config.model.cache_dir,
        deepspeed_config=deepspeed_config,
    )
    check_latent_ids(encoder.ids, backbone, config.model.path)
    model = make_model(config, backbone)
    check_room(config.run.dir, model, device)
    write_folder(config, facts)
    gather = choose_gather(config.model, config.train.stage)
    mark_gather_units(model, gather)
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    state = load_state(engine, config, found)
    if distributed.is_main():
        print(describe(config, shards, model, backbone, max_steps))
        print(describe_gather(model, gather, deepspeed_config, DTYPES[config.train.dtype]))
        print(pooling, flush=True)

    metrics = Metrics(
        config.run.dir,
        global_batch_size=config.train.samples_per_step(distributed.world_size()),
        max_steps=max_steps,
        log_freq=config.train.log_freq,
        steps_done=state.step,
    )
    trainer = Trainer(
        engine,
        open_stream(config, shards, encoder, state, device),
        config.train,
        metrics,
        state,
        max_steps=max_steps,
        device=device,
        agree_on_passes=gather == "layer" and config.train.stage == "stage2",
        early_end=watch_end(config),
    )
    copies = open_copies(config)
    heartbeat = Heartbeat(config.run.dir, distributed.rank(), config.distributed.timeout_s)
    heartbeat.beat(state.step)
    with profiler(config, state) as profile_step:
        trainer.train(
            after_step=[
                lambda state: heartbeat.beat(state.step),
                validate_if_due(trainer, config, encoder),
                save_if_due(trainer, config, facts, copies),
                profile_step,
            ]
        )
    early_end.ignore()
    heartbeat.stop()
    metrics.close()
    if distributed.is_main() and state.step < max_steps:
        early_end.mark(config.run.dir, state.step)
        print(f"saved after step {state.step} of {max_steps}, to be continued with run.resume=auto", flush=True)
    distributed.shut_down()
    if copies is not None:
        copies.wait()


def open_copies(config: Config) -> Copies | None:
    """What copies this run's checkpoints to `checkpoint.copy_to`: on rank 0, if it is set."""
    if config.checkpoint.copy_to is None or not distributed.is_main():
        return None
    name = config.run.dir.absolute().name
    return Copies(config.checkpoint.copy_to / name, config.checkpoint.keep_latest_k)


def open_encoder(config: Config) -> Encoder:
    """What turns samples into tokens; every sample of the run's shards fits it."""
    encoder = load_encoder(
        config.model.path,
        stage=config.train.stage,
        latent_size=config.model.latent_size,
        system_turn=config.data.system_turn,
        max_length=config.data.max_length,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        cache_dir=config.model.cache_dir,
        compress_strategy=config.model.compress_strategy,
    )
    for folder in (config.data.shards, config.evaluation.shards):
        if folder is not None:
            encoder.check_index(load_manifest(folder))
    return encoder


def make_model(config: Config, backbone: Backbone) -> MirageModel:
    """The method's losses over a backbone."""
    return MirageModel(
        backbone,
        stage=config.train.stage,
        ce_loss_weight=config.train.text_weight,
        latent_loss_weight=config.train.latent_loss_weight,
        recompute=config.model.activation_checkpointing == "full",
        train_tower=config.model.train_tower,
        compress_strategy=config.model.compress_strategy,
    )


def prepare_torch(config: Config) -> None:
    """Seeds, and on request only deterministic kernels."""
    torch.manual_seed(config.run.seed)
    if config.train.deterministic:
        # cuBLAS reads it when it starts; https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # transformers asks this variable, not torch, what its FlashAttention shall do
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        torch.use_deterministic_algorithms(True)


def load_state(engine: DeepSpeedEngine, config: Config, found: Path | None) -> TrainState:
    """Where the run stands: at a checkpoint of its own, or at its beginning, perhaps with another run's weights."""
    if found is not None:
        if distributed.is_main():
            print(f"goes on from {found}", flush=True)
        return resume(engine, found)
    if config.run.init_from:
        load_weights(engine, config.run.init_from)
    return TrainState()


def watch_end(config: Config) -> early_end.EarlyEnd:
    """What may end the run before its last step: signals on every rank, on rank 0 the job's time limit too."""
    end_s = early_end.job_end_s(say=print) if distributed.is_main() else None
    return early_end.EarlyEnd(end_s, config.run.save_before_end_s)


def open_stream(
    config: Config, shards: ShardFolder, encoder: Encoder, state: TrainState, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches from the run's position on."""
    share = Share(
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=config.train.micro_batch_size_per_gpu,
        gradient_accumulation_steps=config.train.accumulation_steps(distributed.world_size()),
        start=state.position,
    )
    loader = make_loader(
        shards,
        encoder,
        partial(collate, align_latents=config.train.stage == "stage2"),
        share,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def describe(config: Config, shards: ShardFolder, model: MirageModel, backbone: Backbone, max_steps: int) -> str:
    """What will be computed, for the start of the log."""
    train, ranks = config.train, distributed.world_size()
    size = train.samples_per_step(ranks)
    numel = {True: 0, False: 0}
    for parameter in model.parameters():
        numel[parameter.requires_grad] += whole_numel(parameter)
    return (
        f"{train.stage}: {numel[True] / 1e6:.1f} M parameters trained, {numel[False] / 1e6:.1f} M frozen, "
        f"{train.dtype}, attention {backbone.attention}, latent_size {config.model.latent_size}\n"
        f"{shards.num_samples} samples; global batch {size} = {ranks} ranks x {train.micro_batch_size_per_gpu} x "
        f"{train.accumulation_steps(ranks)} accumulated; {max_steps} steps = "
        f"{max_steps * size / shards.num_samples:.1f} epochs"
    )


def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, for example one of launch/recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by DeepSpeed's launcher.")] = 0,
) -> None:
    """Trains one run."""
    try:
        config = load_config(recipe, overrides)
        with name_full_disk(config.run.dir, "free some space, and start again, with run.resume=auto if a run is there"):
            train(config)
    except MirageError as error:
        # A configuration is wrong on all ranks alike; bad data and a full disk may be met by one of them at its work.
        alone = isinstance(error, (DataError, DiskFullError)) and torch.distributed.is_initialized()
        leave(error, every_rank=alone)


def main() -> None:
    transformers_logging.disable_progress_bar()
    # DeepSpeed calls torch's collectives by their old names, on every rank and step; a user can do nothing about it.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
