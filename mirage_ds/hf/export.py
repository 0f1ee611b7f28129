"""Exports a checkpoint as a complete Hugging Face folder for plain transformers; never holds the full model in memory.

mirage export --checkpoint RUN --output FOLDER

All weights, also frozen ones, come from the checkpoint: the run computed with them. Configuration, tokenizer, chat
template, image processor and generation defaults come from the model that the run started from.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.checkpoint.find import find_named
from mirage_ds.checkpoint.partitions import StoredParameter, check_fit, stored_parameters
from mirage_ds.config import Config, Dtype
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.errors import CheckpointError, ConfigError
from mirage_ds.hf.adapter import Form, MergedParameter, StoredAdapter, check_form, finite, not_written
from mirage_ds.hf.custom_generate import generate
from mirage_ds.hf.model_card import model_card
from mirage_ds.hf.written_folder import finish
from mirage_ds.model import latent_settings
from mirage_ds.model.backbone import DTYPES, empty_model, file_name, has_file
from mirage_ds.model.latent_settings import LatentSettings, LatentTokenIds
from mirage_ds.output_folder import new_folder
from mirage_ds.tokens import TokenIds

INDEX_NAME = "model.safetensors.index.json"
MB = 10**6


def export_checkpoint(
    path: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    model: str | None = None,
    form: Form | None = None,
) -> str:
    """Writes the folder and returns a short description of its contents.

    Args:
        path: a run's folder, for its last checkpoint, or one checkpoint in it.
        dtype: bf16 or fp32, of the weights; None: the run's train.dtype. For a bf16 run, bf16 gives the weights that
            it computed with, and fp32 its masters.
        max_shard_size: of a file of weights, such as 5GB (1 GB = 10**9 bytes); a larger parameter gets its own file.
        model: folder or hub id of the model that the run started from; None: the run's model.path.
        form: of a run with an adapter, see adapter.py.

    Raises:
        CheckpointError: there is no such checkpoint, a rank's file is missing or damaged, the model does not match, or
            a weight is not finite.
        ConfigError: the model that the run started from is missing, `max_shard_size` is not a size, or `form` does not
            fit the run.
        DataError: `output` already exists, or cannot be written.
    """
    checkpoint = find_named(path)
    facts = read_facts(checkpoint / FACTS_NAME)
    config = _run_config(facts, checkpoint)
    check_form(form, config, checkpoint)
    stored = stored_parameters(checkpoint, facts["world_size"])
    source, cache_dir = model or config.model.path, config.model.cache_dir
    hf = _model_of(source, config, checkpoint)
    tokenizer = load_tokenizer(source, cache_dir)
    adapter = None
    if config.model.lora is None:
        check_fit(stored, hf, checkpoint)
    else:
        adapter = StoredAdapter(checkpoint, stored, config, source, hf, TokenIds.of(tokenizer).latents)
        check_fit(stored, adapter.add_to(_model_of(source, config, checkpoint)), checkpoint)
    image_processor = ImageProcessor.load(
        source, cache_dir, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels
    )
    dtype = dtype or config.train.dtype
    if adapter is not None and form == "adapter":
        return f"step {facts['step']} of {config.run.dir} ({config.train.stage}) as {adapter.write(output, dtype)}"
    _set_config(hf, DTYPES[dtype], _latent_settings(config, TokenIds.of(tokenizer)))
    merged = adapter.merged() if adapter is not None else stored
    parameters = {file_name(name): merged[name] for name, _ in hf.named_parameters()}
    files = _divide(parameters, DTYPES[dtype], max_shard_size)
    generation = _generation_config(source, cache_dir, hf)
    card = model_card(config, facts, checkpoint.parents[1], source, generation)
    needs_bytes = files.metadata["total_size"]
    size = f"{needs_bytes / MB:.1f} MB"
    try:
        with new_folder(output, needs_bytes=needs_bytes) as folder:
            hf.config.save_pretrained(folder)
            generation.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            image_processor.save(folder)
            _write_weights(parameters, files, DTYPES[dtype], folder, checkpoint)
            if adapter is not None:
                adapter.check_base(facts)
            _write_decoding(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            finish(folder)
    except (OSError, SafetensorError) as error:
        raise not_written(output, size, error) from error
    return f"step {facts['step']} of {config.run.dir} ({config.train.stage}) as {size} of {dtype} weights"


def _run_config(facts: Mapping[str, Any], checkpoint: Path) -> Config:
    try:
        return Config.model_validate(facts["config"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"run.json has no configuration of this version ({checkpoint}): {error}; expected the file that the run "
            "wrote; restore it, or export with the version that trained it"
        ) from error


def _model_of(source: str, config: Config, checkpoint: Path) -> PreTrainedModel:
    """The model that the run started from, without its weights."""
    try:
        return empty_model(source, config.model.cache_dir)
    except ConfigError as error:
        raise ConfigError(
            f"{error} (the run in {checkpoint} started from model.path={config.model.path}; if it has moved, name "
            "its folder with --model)"
        ) from error


def _latent_settings(config: Config, ids: TokenIds) -> LatentSettings:
    return LatentSettings(
        latent_size=config.model.latent_size,
        stage=config.train.stage,
        system_turn=config.data.system_turn,
        exif_orientation=config.data.exif_orientation,
        answer_sees_image=config.model.answer_sees_image,
        text_dropout_image=config.data.text_dropout_image,
        compress_strategy=config.model.compress_strategy,
        latent_token_ids=LatentTokenIds(pad=ids.latent_pad, start=ids.latent_start, end=ids.latent_end),
    )


def _set_config(hf: PreTrainedModel, dtype: torch.dtype, settings: LatentSettings) -> None:
    """Sets what differs from the configuration of the model that the run started from."""
    hf.config.dtype = dtype
    hf.config.architectures = [type(hf).__name__]
    setattr(hf.config, latent_settings.KEY, settings.model_dump())


def _generation_config(source: str, cache_dir: Path | None, hf: PreTrainedModel) -> GenerationConfig:
    """The generation defaults of the model that the run started from, or of its configuration if it has none."""
    if not has_file(source, GENERATION_CONFIG_NAME, cache_dir):
        return GenerationConfig.from_model_config(hf.config)
    try:
        return GenerationConfig.from_pretrained(source, cache_dir=cache_dir)
    except OSError as error:
        raise ConfigError(
            f"{GENERATION_CONFIG_NAME} cannot be read ({source}): {error}; expected JSON as transformers writes it; "
            "fix or remove the file"
        ) from error


def _write_decoding(folder: Path) -> None:
    """Writes what plain transformers decodes with, if it may: the one file, by the name that it looks for."""
    file = folder / "custom_generate" / "generate.py"
    file.parent.mkdir()
    shutil.copyfile(generate.__file__, file)


def _divide(
    parameters: Mapping[str, StoredParameter | MergedParameter], dtype: torch.dtype, max_shard_size: str
) -> StateDictSplit:
    """Decides which parameters go into which file."""
    sizes = {name: torch.empty(stored.shape, dtype=dtype, device="meta") for name, stored in parameters.items()}
    try:
        return split_torch_state_dict_into_shards(
            sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(
            f"{max_shard_size!r:.80} is not a size (--max-shard-size): {error}; expected a number with KB, MB, GB or "
            "TB; write for example 5GB"
        ) from error


def _write_weights(
    parameters: Mapping[str, StoredParameter | MergedParameter],
    files: StateDictSplit,
    dtype: torch.dtype,
    folder: Path,
    checkpoint: Path,
) -> None:
    """Writes one file at a time: at most one file and a part of a parameter are in memory.

    Raises:
        CheckpointError: a weight is not finite.
    """

    for name, members in files.filename_to_tensors.items():
        # transformers only accepts files with this entry as torch's.
        weights = {member: finite(member, parameters[member].read(dtype), checkpoint) for member in members}
        save_file(weights, folder / name, metadata={"format": "pt"})
        del weights
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
