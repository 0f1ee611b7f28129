"""Makes DeepSpeed's configuration from ds_configs/*.json and the run's configuration. Every number has one owner.

A DeepSpeed JSON sets what only DeepSpeed uses (ZeRO's buckets and thresholds, offload, the dtypes of gradient
accumulation and communication) and has "auto" where the run's configuration decides.
"""

from pathlib import Path
from typing import Any, get_args

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

import ds_configs
from mirage_ds import strict_json
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import hint
from mirage_ds.zero3.engine import choose_gather

# Allowed keys of a DeepSpeed JSON. DeepSpeed ignores unknown keys, and has keys that contradict the method: other
# precisions, its own learning rates and batch arithmetic.
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
# The only keys of the two precision sections: masters are float32.
PRECISION_KEYS = {"bf16": ("enabled",), "data_types": ("grad_accum_dtype",)}
REDUCTION_DTYPES = ("fp32", "bf16")
# Sections whose keys are checked by DeepSpeed's own definitions.
DEEPSPEED_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "comms_logger": CommsLoggerConfig,
}
EVERYTHING = 10**15  # elements: more than any model has
# What "auto" means in `zero_optimization`, by what is gathered at a time. A rollout is gathered while the tower runs:
# DeepSpeed prefetches the weights that come next until one of these numbers of elements is reached.
GATHER_SETTINGS: dict[str, dict[str, int]] = {
    "layer": {"stage3_prefetch_bucket_size": 200_000_000, "stage3_max_live_parameters": 1_000_000_000},
    "groups": {"stage3_prefetch_bucket_size": 200_000_000, "stage3_max_live_parameters": 1_000_000_000},
    "rollout": {"stage3_prefetch_bucket_size": EVERYTHING, "stage3_max_live_parameters": EVERYTHING},
}
OWNED_BY_THE_RUN = {
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.warmup_steps and train.lr_decay",
    "train_batch_size": "train.global_batch_size",
    "fp16": "train.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}


def resolve_deepspeed_config(config: Config) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and fills in the values of the run's configuration.

    DeepSpeed gets one accumulation step: the trainer sets the boundary, so that a loss is scaled in one place only.

    Raises:
        ConfigError: the file is missing or not JSON, has an unknown key, is not ZeRO-3, or contradicts the run's
            configuration.
    """
    name = config.distributed.deepspeed_config
    path = Path(name) if "/" in name else Path(ds_configs.__path__[0]) / name
    where = f"distributed.deepspeed_config={name}"
    try:
        resolved = strict_json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the DeepSpeed configuration cannot be read ({where}): {error}; expected a path, or the name of a file "
            "in ds_configs/; correct it"
        ) from error
    _check_keys(resolved, where)
    if resolved.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(
            f"zero_optimization.stage is not 3 ({where}); mirage_ds runs under ZeRO-3 only; set it, or use zero3.json"
        )
    train, zero = config.train, resolved["zero_optimization"]
    if config.model.lora is not None and zero.get("offload_param", {}).get("device") == "nvme":
        raise ConfigError(
            f"zero_optimization.offload_param.device is nvme with model.lora ({where}); the base could not be compared "
            "with that of a checkpoint, as its weights are in no memory; allowed: cpu or none; set one of them"
        )
    for key, value in GATHER_SETTINGS[choose_gather(config)].items():
        if zero.get(key) == "auto":
            zero[key] = value
    _fill(resolved, ["train_micro_batch_size_per_gpu"], train.micro_batch_size_per_gpu, where)
    _fill(resolved, ["gradient_accumulation_steps"], 1, where)
    _fill(resolved, ["gradient_clipping"], train.gradient_clipping, where)
    _fill(resolved, ["bf16", "enabled"], train.dtype == "bf16", where)
    for keys in (["data_types", "grad_accum_dtype"], ["communication_data_type"]):
        if _get(resolved, keys) not in REDUCTION_DTYPES:
            raise ConfigError(
                f"{'.'.join(keys)} is {_get(resolved, keys)!r:.80} ({where}); allowed: "
                f"{', '.join(REDUCTION_DTYPES)}, set explicitly, as DeepSpeed's default would change results; "
                'write "fp32" as in zero3.json'
            )
    _check_sections(resolved, where)
    return resolved


def _check_keys(tree: Any, where: str) -> None:
    """Refuses keys that DeepSpeed would ignore, and keys that the run's configuration owns."""
    if not isinstance(tree, dict):
        raise ConfigError(f"the file is not a JSON object ({where}); expected one as in zero3.json; start from that")
    for key, value in tree.items():
        if key in OWNED_BY_THE_RUN:
            raise ConfigError(
                f"{key} must not be set ({where}); the run's configuration owns it; delete it there and set "
                f"{OWNED_BY_THE_RUN[key]} in the recipe"
            )
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(f"unknown key {key} ({where}): {hint(key, DEEPSPEED_KEYS)}; rename or delete it")
        if key in (*DEEPSPEED_SECTIONS, *PRECISION_KEYS) and not isinstance(value, dict):
            raise ConfigError(
                f"{key} is {value!r:.80} ({where}); expected a section in braces; write it as in zero3.json"
            )
        for name in value if key in PRECISION_KEYS else ():
            if name not in PRECISION_KEYS[key]:
                raise ConfigError(
                    f"unknown key {key}.{name} ({where}): {hint(name, PRECISION_KEYS[key])}; rename or delete it"
                )


def _check_sections(resolved: dict[str, Any], where: str) -> None:
    """Checks each section with DeepSpeed's own definition; no "auto" may remain."""
    for name, definition in DEEPSPEED_SECTIONS.items():
        section = resolved.get(name, {})
        for key, value in section.items():
            if value == "auto":  # DeepSpeed would ignore it
                raise ConfigError(
                    f'{name}.{key} is "auto" ({where}); the run does not set this key; write a value or delete the key'
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
                problem = f"{key} is {details['input']!r:.80} ({where}): {details['msg']}"
            raise ConfigError(f"{problem}; correct it in the file") from error


def _names_in(definition: type[BaseModel], parents: list[str]) -> list[str]:
    """The keys that DeepSpeed defines in a subsection, by their aliases (such as stage3_...) if they have one."""
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
            f"{'.'.join(keys)} is {tree[last]!r:.80} in the file, but {value!r} in the run's configuration ({where}); "
            'the run owns this value; write "auto" there and set it in the recipe'
        )
    tree[last] = value
