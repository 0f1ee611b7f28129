"""Makes a complete model folder from any Qwen2.5-VL; needs no network if that is a folder.

mirage init --from MODEL --output models/a [--processor-from OTHER]
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.conversation import read_tokenizer
from mirage_ds.errors import ConfigError
from mirage_ds.hf.written_folder import finish
from mirage_ds.model.backbone import ROW_MULTIPLE, check_config, has_file, load_complete
from mirage_ds.output_folder import new_folder
from mirage_ds.tokens import LATENT_TOKENS, TokenIds

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def copy_pretrained(source: str, output: Path, processor_from: str | None = None) -> None:
    """Writes config, weights, tokenizer with the latent tokens, chat template and image processor to `output`.

    Args:
        source: folder or hub id of a Qwen2.5-VL of any version, including checkpoints of the reference.
        processor_from: source of the tokenizer, its chat template and the image processor if `source` lacks them.
    Raises:
        ConfigError: `source` is not a Qwen2.5-VL, or something is missing in both sources.
        DataError: `output` already exists.
    """
    check_config(source)
    tokenizer = _tokenizer(source, processor_from)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(
        _source_of(PROCESSOR_FILES, "image processor", source, processor_from)
    )
    tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    with new_folder(output) as folder:
        _copy_model(source, folder, TokenIds.of(tokenizer), num_ids)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        finish(folder)


def _copy_model(path: str, folder: Path, ids: TokenIds, num_ids: int) -> None:
    """Copies config, weights (as safetensors, bit for bit) and generation defaults of a folder or hub id.

    Args:
        ids: of the tokenizer that the copy will have.
        num_ids: one more than that tokenizer's largest id; if the model has fewer rows, rows are added, each the mean
            of the existing ones.

    Raises:
        ConfigError: weights are missing, or the tokenizer is another model's.
    """
    model = load_complete(path, dtype="auto")
    wanted, found = (ids.image_pad, ids.vision_start), (model.config.image_token_id, model.config.vision_start_token_id)
    if wanted != found:
        raise ConfigError(
            f"the tokenizer has the ids {wanted} for image pads and starts, the model {found} ({path}); they must be "
            "the same; use this model's own tokenizer"
        )
    if num_ids > model.config.get_text_config().vocab_size:
        _add_rows(model, num_ids)
    model.save_pretrained(folder)


def _add_rows(model: Any, num_rows: int) -> None:
    """Extends embeddings and head to at least `num_rows` rows, a multiple of ROW_MULTIPLE."""
    old = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(num_rows, pad_to_multiple_of=ROW_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(dim=0)


def _tokenizer(source: str, processor_from: str | None) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(_source_of(TOKENIZER_FILES, "tokenizer", source, processor_from))
    if not tokenizer.chat_template and processor_from is not None:
        tokenizer.chat_template = read_tokenizer(processor_from).chat_template
    if not tokenizer.chat_template:
        raise _missing("chat template", source, processor_from)
    return tokenizer


def _source_of(names: tuple[str, ...], what: str, source: str, processor_from: str | None) -> str:
    """The first of the two sources that has one of the files."""
    for candidate in filter(None, (source, processor_from)):
        if any(has_file(candidate, name) for name in names):
            return candidate
    raise _missing(what, source, processor_from)


def _missing(what: str, source: str, processor_from: str | None) -> ConfigError:
    return ConfigError(
        f"no {what} ({source}{f' and {processor_from}' if processor_from else ''}); a complete model folder has one; "
        "name a folder or hub id of Qwen2.5-VL that has it with --processor-from"
    )
