"""Trains one run. Started by a launcher, or alone as one process:

deepspeed --num_accelerators 2 --module mirage_ds.train RECIPE [section.key=value ...]
torchrun --nproc-per-node 2 --module mirage_ds.train RECIPE [section.key=value ...]
srun python -m mirage_ds.train RECIPE [section.key=value ...]
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from deepspeed import DeepSpeedEngine
from transformers.utils import logging as transformers_logging

from mirage_ds import checkpoint, distributed
from mirage_ds.batch import Batch
from mirage_ds.config import Config, load_config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import Share, make_loader
from mirage_ds.engine import (
    DTYPES,
    choose_gather,
    describe_gather,
    initialize,
    mark_gather_units,
    parameter_groups,
    resolve_deepspeed_config,
    whole_numel,
)
from mirage_ds.errors import ConfigError, DataError, MirageError
from mirage_ds.metrics import Metrics
from mirage_ds.model.backbone import Backbone, load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.trainer import Trainer, TrainState


def train(config: Config) -> None:
    """The whole run, from configuration to last checkpoint."""
    torch.manual_seed(config.run.seed)
    deepspeed_config = resolve_deepspeed_config(config)
    device = distributed.init(config.distributed.timeout_s)
    shards = load_manifest(config.data.shards)
    encoder = load_encoder(
        config.model.path,
        stage=config.train.stage,
        latent_size=config.model.latent_size,
        system_turn=config.data.system_turn,
        max_length=config.data.max_length,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        cache_dir=config.model.cache_dir,
    )
    start_run_folder(config)
    if config.run.init_from:
        checkpoint.check_start(config.run.init_from, config)

    backbone = load_backbone(
        config.model.path,
        dtype=DTYPES[config.train.dtype],
        attention=config.model.attention,
        train_tower=config.model.train_tower,
        cache_dir=config.model.cache_dir,
        deepspeed_config=deepspeed_config,
    )
    check_latent_ids(encoder, backbone, config.model.path)
    model = MirageModel(
        backbone,
        stage=config.train.stage,
        ce_loss_weight=config.train.text_weight,
        latent_loss_weight=config.train.latent_loss_weight,
        recompute=config.model.activation_checkpointing == "full",
        train_tower=config.model.train_tower,
    )
    gather = choose_gather(config.model, config.train.stage)
    mark_gather_units(model, gather)
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    if config.run.init_from:
        checkpoint.load_weights(engine, config.run.init_from)
    describe(config, shards, model, backbone, gather, deepspeed_config["zero_optimization"])

    state = TrainState()
    metrics = Metrics(
        config.run.dir,
        global_batch_size=config.train.global_batch_size(distributed.world_size()),
        max_steps=config.train.max_steps,
        log_freq=config.train.log_freq,
    )
    trainer = Trainer(
        engine,
        open_stream(config, shards, encoder, state, device),
        config.train,
        metrics,
        state,
        device=device,
        agree_on_passes=gather == "layer" and config.train.stage == "stage2",
        after_step=partial(save_if_due, engine, config, shards.digest),
    )
    trainer.train()
    metrics.close()
    distributed.shut_down()


def start_run_folder(config: Config) -> None:
    """Makes the run's folder and writes the resolved configuration into it.

    Raises:
        ConfigError: on every rank, if the folder holds a run already.
    """
    taken = (config.run.dir / "metrics.jsonl").exists()
    distributed.barrier()  # every rank has looked before rank 0 writes
    if taken:
        raise ConfigError(
            f"the folder holds another run already (run.dir={config.run.dir}); a run needs a folder of its own; "
            "set run.dir to a new one, or delete it"
        )
    if distributed.is_main():
        config.run.dir.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (config.run.dir / "config.yaml").write_text(resolved)


def check_latent_ids(encoder: Encoder, backbone: Backbone, path: str) -> None:
    """Refuses a vocabulary whose latent tokens have no row in the embeddings.

    Raises:
        ConfigError: an id is too large.
    """
    largest = max(encoder.ids.latent_pad, encoder.ids.latent_start, encoder.ids.latent_end)
    if largest >= backbone.vocab_size:
        raise ConfigError(
            f"the latent token id {largest} has no embedding (model.path={path}): the model has {backbone.vocab_size} "
            "rows; every id of the tokenizer must be below that; set model.path to a folder with more of them, which "
            f"`mirage init --from {path} --output FOLDER` writes"
        )


def open_stream(
    config: Config, shards: ShardFolder, encoder: Encoder, state: TrainState, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches from the run's position on."""
    share = Share(
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=config.train.micro_batch_size_per_gpu,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
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


def save_if_due(engine: DeepSpeedEngine, config: Config, digest: str, state: TrainState) -> None:
    """Saves every `checkpoint.interval` steps and after the last one."""
    interval = config.checkpoint.interval
    if state.step == config.train.max_steps or (interval and state.step % interval == 0):
        checkpoint.save(engine, config, state, digest)


def describe(
    config: Config, shards: ShardFolder, model: MirageModel, backbone: Backbone, gather: str, zero: dict[str, int]
) -> None:
    """Says at the start what will be computed, and how."""
    if not distributed.is_main():
        return
    train, ranks = config.train, distributed.world_size()
    epochs = train.max_steps * train.global_batch_size(ranks) / shards.num_samples
    numel = {True: 0, False: 0}
    for parameter in model.parameters():
        numel[parameter.requires_grad] += whole_numel(parameter)
    print(
        f"{train.stage}: {numel[True] / 1e6:.1f} M parameters trained, {numel[False] / 1e6:.1f} M frozen, "
        f"{train.dtype}, attention {backbone.attention}, latent_size {config.model.latent_size}\n"
        f"{shards.num_samples} samples; global batch {train.global_batch_size(ranks)} = {ranks} ranks x "
        f"{train.micro_batch_size_per_gpu} x {train.gradient_accumulation_steps} accumulated; "
        f"{train.max_steps} steps = {epochs:.1f} epochs\n"
        f"{describe_gather(model, gather, zero['stage3_max_live_parameters'], DTYPES[train.dtype])}",
        flush=True,
    )


def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, for example one of launch/recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by DeepSpeed's launcher.")] = 0,
) -> None:
    """Trains one run."""
    try:
        train(load_config(recipe, overrides))
    except MirageError as error:
        # A configuration is wrong on all ranks alike; bad data is met by one of them.
        if isinstance(error, DataError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait in a collective: leave without waiting for them, the launcher ends them.
        sys.stderr.flush()
        os._exit(2)


def main() -> None:
    transformers_logging.disable_progress_bar()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()


if __name__ == "__main__":
    main()
