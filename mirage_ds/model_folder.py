"""Refuses a model that does not exist, is damaged or cannot be trained, before torch and transformers are loaded."""

import difflib
import errno
import os
import re
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import ConfigError, reason_of

HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
ADAPTER_NAME = "adapter_config.json"
# What transformers reads from a model folder; each is one JSON object.
JSON_NAMES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", ADAPTER_NAME),
)
READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".bin", ".txt")
MAX_NAMED = 5  # files of a folder, in a message
REMEDY = "copy the folder again, or name another model"


def check_model(name: str, where: str, cache_dir: Path | None = None) -> None:
    """Refuses a folder that is missing, damaged or not a model to train, and what is not the form of a hub id.

    Raises:
        ConfigError: it names the folder and, if there is one, the file.
    """
    check_exists(name, where, cache_dir)
    if Path(name).is_dir():
        _check_files(Path(name))


def check_exists(name: str, where: str, cache_dir: Path | None = None) -> None:
    """Refuses what is neither a folder nor the form of a hub id; whether the hub has that id, only the hub knows.

    Args:
        where: the option or key with its value, for the message.
        cache_dir: for downloads from the hub; None: the Hugging Face default.

    Raises:
        ConfigError: the message has the system's reason, and the nearest name.
    """
    path = Path(name)
    try:
        path.stat()
    except OSError as error:
        # runs/tiny-modle beside runs/tiny-model; os.path answers False where a Path raises
        local = os.path.exists(path.parts[0]) and not is_cached(name, cache_dir)
        if local or not HUB_ID.fullmatch(name) or error.errno != errno.ENOENT:
            raise ConfigError(
                f"the model folder does not exist ({where}): {reason_of(error)}, seen from {Path.cwd()}; "
                f"{_nearest(path)}allowed: a Hugging Face folder (on a cluster: one that every node sees) or a hub id, "
                "OWNER/NAME; correct it"
            ) from error
        _check_offline(name, where, cache_dir)
        return
    if not path.is_dir():
        raise ConfigError(
            f"the model is a file ({where}); allowed: a Hugging Face folder with config.json and safetensors, or a hub "
            "id; name the folder"
        )


def is_cached(name: str, cache_dir: Path | None = None) -> bool:
    """Whether a hub id was downloaded to this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE  # most runs have a folder

    return os.path.isdir(Path(cache_dir or HF_HUB_CACHE) / f"models--{name.replace('/', '--')}")


def _check_offline(name: str, where: str, cache_dir: Path | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not is_cached(name, cache_dir):
        raise ConfigError(
            f"there is no folder {name} ({where}, seen from {Path.cwd()}), the hub's cache {cache_dir or HF_HUB_CACHE} "
            "does not have it, and HF_HUB_OFFLINE forbids to ask the hub; allowed: a folder, or a hub id that was "
            "downloaded; correct it, or unset HF_HUB_OFFLINE"
        )


def _nearest(path: Path) -> str:
    """The most similar path that exists, as a question; empty if there is none."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.isdir(folder))
    missing = path.absolute().relative_to(parent).parts
    try:
        near = difflib.get_close_matches(missing[0], os.listdir(parent), n=1) if missing else []
    except PermissionError:
        return ""
    return f"did you mean {parent / near[0]}? " if near else ""


def _check_files(folder: Path) -> None:
    """Each file can be read, each JSON file is an object, and the weights can be trained."""
    try:
        files = {path.name: path for path in folder.iterdir() if path.suffix in READ_SUFFIXES}
        for path in files.values():
            with path.open("rb"):
                pass
    except OSError as error:
        raise ConfigError(
            f"a file of the model cannot be read ({error.filename}): {reason_of(error)}; a model folder must be "
            f"readable; fix its permissions, or {REMEDY}"
        ) from error
    contents = {name: _read_object(files[name]) for name in JSON_NAMES if name in files}
    if ADAPTER_NAME in contents:
        base = contents[ADAPTER_NAME].get("base_model_name_or_path")
        raise ConfigError(
            f"the model is an adapter (LoRA) of {base!r:.80} ({folder}/{ADAPTER_NAME}); only complete models can be "
            "loaded; merge it into its base by mirage export --merge of its run, which also says how latents are "
            "decoded, as peft's merge_and_unload does not; name the merged folder"
        )
    if "config.json" not in contents:
        if (folder / "checkpoints").is_dir():
            raise ConfigError(
                f"this is the folder of a run, not of a model ({folder}); expected a Hugging Face folder or a hub id; "
                f"export the run: mirage export --checkpoint {folder} --output DIR"
            )
        others = sorted(path.name for path in folder.iterdir())
        raise ConfigError(
            f"no config.json ({folder}), files: {', '.join(others[:MAX_NAMED]) or 'none'}; a model folder has "
            "config.json and safetensors, as on the hub (not GGUF or ONNX); name one that has"
        )
    for section in ("text_config", "vision_config"):
        if not isinstance(contents["config.json"].get(section, {}), dict):  # transformers would take that of a 7B model
            raise ConfigError(
                f"{section} is no object ({folder}/config.json); expected the sections of a Qwen2.5-VL; {REMEDY}"
            )
    check_not_quantized(contents["config.json"].get("quantization_config"), str(folder))


def check_not_quantized(quantization: Any, name: str) -> None:
    """Refuses weights of a few bits, which have no gradients.

    Args:
        quantization: the entry `quantization_config` of config.json, if there is one.

    Raises:
        ConfigError: it names the method.
    """
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"the model is quantized ({method!s:.80}; quantization_config in {name}/config.json); its weights "
            "cannot be trained, only those of the original model in bf16 or fp32; name the unquantized one"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"a file of the model is damaged ({path}): {error!s:.200}; expected a JSON object, as on the hub; {REMEDY}"
        ) from error
    return content
