"""Checks of what a recipe names: attention, kernels, model, shards and evaluation."""

from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator

from launch.doctor.findings import Row, failure
from mirage_ds.config import Config
from mirage_ds.data.folders import load_folders
from mirage_ds.data.index import load_index
from mirage_ds.data.places import Reading
from mirage_ds.data.shard_samples import parse_members, read_range
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.training.named import check_rows, check_scoring
from mirage_ds.model.attention import choose_attention
from mirage_ds.model.backbone import DTYPES, check_config
from mirage_ds.model.latent_settings import check_latent_size
from mirage_ds.ops.latent_pool import describe_path
from mirage_ds.training.sample_costs import measure_folders
from mirage_ds.training.start import open_encoder

SAMPLES_READ = 8  # per folder of shards, spread evenly over its index


def check_attention(config: Config) -> Row:
    """What `model.attention` becomes here, and why it is not FlashAttention 2."""
    device_type = get_accelerator().device_name()
    try:
        chosen, no_flash = choose_attention(config.model.attention, DTYPES[config.train.dtype], device_type)
    except ConfigError as error:
        return failure("attention", error)
    reason = f" ({no_flash})" if no_flash else ""
    kernels = ", by torch's kernels without cuDNN's" if chosen == "sdpa" and device_type == "cuda" else ""
    return Row("attention", chosen + reason + kernels)


def check_kernels() -> Row:
    try:
        return Row("kernels", describe_path(torch.device(get_accelerator().current_device_name())))
    except ConfigError as error:
        return failure("kernels", error)


def check_model(config: Config) -> Row:
    try:
        check_config(config.model.path, config.model.cache_dir)
        if config.run.init_from is None:
            check_latent_size(config.model)
    except ConfigError as error:
        return failure("model", error)
    return Row("model", config.model.path)


def check_samples(config: Config) -> Row:
    """What the index says of each sample, and its length if there is a limit, against the model."""
    try:
        measure_folders(config, open_encoder(config), load_folders(config.data))
    except (ConfigError, DataError) as error:
        return failure("data.shards: samples", error)
    limits = {"max_length": config.data.max_length, "token_budget": config.data.token_budget}
    given = [f"data.{name}={limit}" for name, limit in limits.items() if limit]
    return Row("data.shards: samples", " and ".join(["each fits the stage and the model", *given]))


def check_shards(config: Config) -> Iterator[Row]:
    """The manifest, the size of every shard, and a few samples, read completely."""
    folders = [("data.shards", each.path) for each in config.data.sets]
    if config.evaluation.shards is not None:
        folders.append(("evaluation.shards", config.evaluation.shards))
    for what, folder in folders:
        try:
            shards = load_manifest(folder, Reading.of(config.data))
            num_bytes = read_some(shards)
        except DataError as error:
            yield failure(what, error)
            continue
        num_samples, num_shards = shards.num_samples, len(shards.manifest.shards)
        yield Row(
            what,
            f"{num_samples} {'sample' if num_samples == 1 else 'samples'} in {num_shards} "
            f"{'shard' if num_shards == 1 else 'shards'} ({shards.place}), digest {shards.digest:.12}; read a few, "
            f"{num_bytes} bytes",
        )


def check_evaluation(config: Config) -> Iterator[Row]:
    """What an evaluation in training asks, if the run makes any."""
    evaluation = config.evaluation
    if evaluation.task is None or evaluation.rows is None:
        return
    try:
        check_scoring(evaluation)
        yield Row("evaluation.task", f"{evaluation.task}; latents {evaluation.latents}")
    except ConfigError as error:
        yield failure("evaluation.task", error)
    try:
        check_rows(evaluation.rows)
        yield Row("evaluation.rows", str(evaluation.rows))
    except DataError as error:
        yield failure("evaluation.rows", error)


def read_some(shards: ShardFolder) -> int:
    """Reads SAMPLES_READ samples as the trainer does; returns their size in bytes.

    Raises:
        DataError: a sample cannot be read.
    """
    index = load_index(shards)
    some = index[:: -(-len(index) // SAMPLES_READ)]
    for entry in some:
        shard = shards.manifest.shards[entry.shard]
        where = f"{shard.name}/{entry.key}"
        parse_members(read_range(shards.place, shard, entry.offset, entry.size, where), entry.key, where)
    return sum(entry.size for entry in some)
