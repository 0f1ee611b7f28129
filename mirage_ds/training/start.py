"""The start of a run: what is found and checked before the model is loaded."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.facts import describe_run
from mirage_ds.checkpoint.find import find_damage, newest_complete, refuse_damaged, require_latest
from mirage_ds.checkpoint.load import check_start
from mirage_ds.config import Config, Stage
from mirage_ds.data.costs import SetCosts
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.folders import ShardFolders, load_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.index import check_digests
from mirage_ds.data.mixture import order_of
from mirage_ds.data.places import Reading
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import is_first_of_node
from mirage_ds.model.backbone import check_config
from mirage_ds.model.latent_settings import check_latent_size
from mirage_ds.ops.latent_pool import describe_path
from mirage_ds.sizing import micro_batch
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.training.run_folder import find_start
from mirage_ds.training.sample_costs import cost_facts, measure_folders, require_same
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import choose_gather


@dataclass(frozen=True)
class Start:
    """A run that may start: its data, its length, and the checkpoint that it resumes from, if there is one."""

    began: float  # seconds since the epoch
    config: Config  # the run's, its micro-batch a number
    deepspeed_config: dict[str, Any]
    shards: ShardFolders
    encoder: Encoder
    device: torch.device
    gather: str  # what ZeRO-3 gathers at a time, `layer`, `groups` or `rollout`
    pooling: str  # which path `latent_pool` takes there
    max_steps: int
    facts: dict[str, Any]  # what its checkpoints say of it
    tags: list[Path]  # all checkpoints that are there
    checkpoint: Path | None
    costs: SetCosts  # the same on all ranks
    costs_source: str  # whether tokens were counted

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint is that of the last step."""
        return self.checkpoint is not None and complete.step_of(self.checkpoint) == self.max_steps


def prepare(config: Config) -> Start:
    """Checks all that can be checked without the model, and joins the process group; writes nothing.

    Raises:
        MirageError: the run cannot start.
    """
    began = time.time()
    deepspeed_config = resolve_deepspeed_config(config)
    shards = load_folders(config.data)
    check_config(config.model.path, config.model.cache_dir)
    if config.model.freeze:
        model_sizes(config.model)  # refuses patterns before the weights are loaded
    if config.run.init_from is None:  # else its weights replace the model's, and check_init_from compares
        check_latent_size(config.model)
    encoder = open_encoder(config)
    device = distributed.init(config.distributed.timeout_s)
    if config.train.micro_batch_size_per_gpu == "auto":
        config = choose_micro_batch(config, deepspeed_config, device)
        deepspeed_config = resolve_deepspeed_config(config)
    costs, source = measure_folders(config, encoder, shards)
    require_same(costs, source, shards, cost_facts(config, encoder))
    pooling = describe_path(device)
    max_steps = config.train.num_steps(order_of(config, shards).num_positions, distributed.world_size())
    check_init_from(config)
    tags = complete.tags(config.run.dir / complete.FOLDER)
    facts = describe_run(config, deepspeed_config, shards.digest, max_steps)
    return Start(
        began=began,
        config=config,
        deepspeed_config=deepspeed_config,
        shards=shards,
        encoder=encoder,
        device=device,
        gather=choose_gather(config),
        pooling=pooling,
        max_steps=max_steps,
        facts=facts,
        tags=tags,
        checkpoint=find_start(config, facts),
        costs=costs,
        costs_source=source,
    )


def choose_micro_batch(config: Config, deepspeed_config: dict[str, Any], device: torch.device) -> Config:
    """The run with the micro-batch that `auto` takes on these ranks: the same on all, as limit and index are."""
    sizes, rows, world_size = model_sizes(config.model), workload(config), distributed.world_size()
    limit_bytes = micro_batch.usable_bytes(device)
    choice = micro_batch.choose(sizes, config, deepspeed_config, rows, world_size, limit_bytes)
    if distributed.is_main():
        print(choice, flush=True)
    return micro_batch.with_micro_batch(config, choice.size, world_size)


def open_encoder(config: Config) -> Encoder:
    """What turns samples into tokens; every sample of the run's shards fits it."""
    encoder, helpers = make_encoder(config, config.train.stage), Helpers.of(config)
    folders = load_folders(config.data).folders
    if config.evaluation.shards is not None:
        folders += (load_manifest(config.evaluation.shards, Reading.of(config.data)),)
    for folder in folders:
        # A wrong number would deal other samples to the ranks of this node. They wait for it before they deal.
        if is_first_of_node():
            check_digests(folder)
        check_usable(encoder, folder, helpers)
    return encoder


def make_encoder(config: Config, stage: Stage) -> Encoder:
    """The encoder of the run's settings; in stage 1 it encodes helper images too."""
    return load_encoder(
        config.model.path,
        stage=stage,
        latent_size=config.model.latent_size,
        system_turn=config.data.system_turn,
        max_length=config.data.max_length,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        cache_dir=config.model.cache_dir,
        compress_strategy=config.model.compress_strategy,
        exif_orientation=config.data.exif_orientation,
        answer_sees_image=config.model.answer_sees_image,
        drops_images=config.data.text_dropout_image > 0,
    )


def check_init_from(config: Config) -> None:
    """The weights to start from fit this run and are intact; a run that resumes does not read them.

    Raises:
        CheckpointError: on every rank.
    """
    resumes = config.run.resume != "never" and newest_complete(config.run.dir)
    if config.run.init_from is None or resumes:
        return
    check_start(config.run.init_from, config)
    checkpoint = require_latest(config.run.init_from)
    refuse_damaged(checkpoint, find_damage(checkpoint))
