"""ds_configs/*.json + the run's configuration -> DeepSpeed's configuration. Every number has one owner.

A DeepSpeed JSON says what DeepSpeed alone decides (ZeRO's buckets and thresholds, offload, the dtypes of gradient
accumulation and communication) and "auto" where the run decides.
"""

import json
from pathlib import Path
from typing import Any, get_args

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

import ds_configs
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import hint

# What a DeepSpeed JSON may hold. DeepSpeed passes over names that it does not know, and knows more than the method
# allows: another precision, its own learning rates or batch arithmetic.
DEEPSPEED_KEYS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "data_types",
    "communication_data_type",
    "zero_optimization",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
)
# The two sections on precision may say only this: masters are float32.
PRECISION_KEYS = {"bf16": ("enabled",), "data_types": ("grad_accum_dtype",)}
REDUCTION_DTYPES = ("fp32", "bf16")
# Sections with DeepSpeed's own definition of their keys.
DEEPSPEED_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "comms_logger": CommsLoggerConfig,
}
OWNED_BY_THE_RUN = {
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.warmup_steps and train.lr_decay",
    "train_batch_size": "train.global_batch_size",
    "fp16": "train.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}


def resolve_deepspeed_config(config: Config) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and fills in what the run decides.

    DeepSpeed sees one accumulation step: the trainer sets the boundary, so that a loss is scaled in one place only.

    Raises:
        ConfigError: the file is missing or not JSON, has an unknown key, is not ZeRO-3, or says something else than
            the run's configuration.
    """
    name = config.distributed.deepspeed_config
    path = Path(name) if "/" in name else Path(ds_configs.__path__[0]) / name
    where = f"distributed.deepspeed_config={name}"
    try:
        resolved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the DeepSpeed configuration cannot be read ({where}): {error}; allowed is a path, or the name of a file "
            "in ds_configs/; correct it"
        ) from error
    _check_keys(resolved, where)
    if resolved.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(
            f"zero_optimization.stage is not 3 ({where}); mirage_ds runs under ZeRO-3 only; set it, or use zero3.json"
        )
    train = config.train
    _fill(resolved, ["train_micro_batch_size_per_gpu"], train.micro_batch_size_per_gpu, where)
    _fill(resolved, ["gradient_accumulation_steps"], 1, where)
    _fill(resolved, ["gradient_clipping"], train.gradient_clipping, where)
    _fill(resolved, ["bf16", "enabled"], train.dtype == "bf16", where)
    for keys in (["data_types", "grad_accum_dtype"], ["communication_data_type"]):
        if _get(resolved, keys) not in REDUCTION_DTYPES:
            raise ConfigError(
                f"{'.'.join(keys)} is {_get(resolved, keys)!r} ({where}); allowed is one of "
                f"{', '.join(REDUCTION_DTYPES)}, written out, as DeepSpeed's own default would change results; "
                'write "fp32" as in zero3.json'
            )
    _check_sections(resolved, where)
    return resolved


def _check_keys(tree: Any, where: str) -> None:
    """Refuses names that DeepSpeed would pass over, and what the run's configuration owns."""
    if not isinstance(tree, dict):
        raise ConfigError(f"the file holds no JSON object ({where}); allowed is one as in zero3.json; start from that")
    for key, value in tree.items():
        if key in OWNED_BY_THE_RUN:
            raise ConfigError(
                f"{key} stands there ({where}); the run's configuration owns it; delete it there and set "
                f"{OWNED_BY_THE_RUN[key]} in the recipe"
            )
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(f"unknown key {key} ({where}): {hint(key, DEEPSPEED_KEYS)}; rename or delete it")
        if key in (*DEEPSPEED_SECTIONS, *PRECISION_KEYS) and not isinstance(value, dict):
            raise ConfigError(
                f"{key} is {value!r} ({where}); allowed is a section in braces; write it as in zero3.json"
            )
        for name in value if key in PRECISION_KEYS else ():
            if name not in PRECISION_KEYS[key]:
                raise ConfigError(
                    f"unknown key {key}.{name} ({where}): {hint(name, PRECISION_KEYS[key])}; rename or delete it"
                )


def _check_sections(resolved: dict[str, Any], where: str) -> None:
    """Holds each section against DeepSpeed's own definition of it; no "auto" may be left."""
    for name, definition in DEEPSPEED_SECTIONS.items():
        section = resolved.get(name, {})
        for key, value in section.items():
            if value == "auto":  # DeepSpeed passes over it as well
                raise ConfigError(
                    f'{name}.{key} is "auto" ({where}); the run decides nothing there; write a value or delete the key'
                )
        try:
            definition(**section)
        except ValidationError as error:
            details = error.errors()[0]
            key = ".".join([name, *map(str, details["loc"])])
            if details["type"] == "extra_forbidden":
                *parents, last = map(str, details["loc"])
                problem = f"unknown key {key} ({where}): {hint(last, _names_in(definition, parents))}"
            else:
                problem = f"{key} is {details['input']!r} ({where}): {details['msg']}"
            raise ConfigError(f"{problem}; correct it in the file") from error


def _names_in(definition: type[BaseModel], parents: list[str]) -> list[str]:
    """The keys that DeepSpeed knows in a section's sub-section; stage3_... are aliases there."""
    for parent in parents:
        annotation = definition.model_fields[parent].annotation
        definition = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return [field.alias or name for name, field in definition.model_fields.items()]


def _get(tree: dict[str, Any], keys: list[str]) -> Any:
    for key in keys:
        tree = tree.get(key, {})
    return tree or None


def _fill(tree: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    *parents, last = keys
    for key in parents:
        tree = tree.setdefault(key, {})
    if tree.get(last, "auto") not in ("auto", value):
        raise ConfigError(
            f"{'.'.join(keys)} is {tree[last]!r} there, but the run's configuration makes it {value!r} ({where}); "
            'the run owns this number; write "auto" there and set it in the recipe'
        )
    tree[last] = value
