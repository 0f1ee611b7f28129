"""ds_configs/*.json + the run's configuration -> a DeepSpeed engine. Every number has one owner.

A DeepSpeed JSON says what DeepSpeed alone decides (ZeRO's buckets and thresholds, offload, the dtypes of gradient
accumulation and communication) and "auto" where the run decides.
"""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_module

import ds_configs
from mirage_ds.config import Config, ModelConfig, Stage, TrainConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.mirage import MirageModel

GIB = 2**30


def resolve_deepspeed_config(config: Config) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and fills in what the run decides.

    DeepSpeed sees one accumulation step: the trainer sets the boundary, so that a loss is scaled in one place only.

    Raises:
        ConfigError: the file is missing or not JSON, is not ZeRO-3, or says something else than the run's
            configuration.
    """
    name = config.distributed.deepspeed_config
    path = Path(name) if "/" in name else Path(ds_configs.__path__[0]) / name
    where = f"distributed.deepspeed_config={name}"
    try:
        resolved = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"the DeepSpeed configuration cannot be read ({where}): {error}; allowed is a path, or the name of a file "
            "in ds_configs/; correct it"
        ) from error
    if resolved.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(
            f"zero_optimization.stage is not 3 ({where}); mirage_ds runs under ZeRO-3 only; set it, or use zero3.json"
        )
    if "optimizer" in resolved or "scheduler" in resolved:
        raise ConfigError(
            f"an optimizer or scheduler section stands there ({where}); the run's configuration owns both; "
            "delete the section and set train.lr, train.weight_decay and the like"
        )
    train = config.train
    _fill(resolved, ["train_micro_batch_size_per_gpu"], train.micro_batch_size_per_gpu, where)
    _fill(resolved, ["gradient_accumulation_steps"], 1, where)
    _fill(resolved, ["gradient_clipping"], train.gradient_clipping, where)
    _fill(resolved, ["bf16", "enabled"], train.dtype == "bf16", where)
    for key in (["data_types", "grad_accum_dtype"], ["communication_data_type"]):
        if _get(resolved, key) is None:
            raise ConfigError(
                f"{'.'.join(key)} is not set ({where}); DeepSpeed's own default would then change results; "
                'write it out, "fp32" as in zero3.json'
            )
    return resolved


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


def choose_gather(model: ModelConfig, stage: Stage) -> str:
    """What ZeRO-3 gathers at a time: `layer` for one pass (overlaps with computing), `rollout` for K + 1 passes."""
    if model.gather != "auto":
        return model.gather
    return "rollout" if stage == "stage2" else "layer"


def mark_gather_units(model: MirageModel, gather: str) -> None:
    """Tells ZeRO-3 what it gathers as one: always the tower and the loss head, and for `rollout` the whole rollout.

    Inside such a unit there is no collective, so ranks may do different work there.
    """
    head = model.rollout.head
    for module in (model.tower, head):
        set_z3_leaf_module(module, True)
    set_z3_leaf_module(model.rollout, gather == "rollout")
    if head.shared:
        unit = model.rollout if gather == "rollout" else head
        deepspeed.zero.register_external_parameter(unit, model.embed_tokens.weight)


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter, of which ZeRO-3 leaves this rank a shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def describe_gather(model: MirageModel, gather: str, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> str:
    """The choice and its memory, for the start of the log."""
    # A set: a head of its own is both among the parameters and the weight that the head uses.
    rollout = sum(whole_numel(parameter) for parameter in {*model.rollout.parameters(), *model.rollout.head.weights})
    tower = sum(whole_numel(parameter) for parameter in model.tower.parameters())
    if gather == "rollout":
        held = rollout
        note = "the rollout once per forward and once per backward; up to twice this while gathering"
    else:
        # DeepSpeed's own default where the file does not say
        held = min(rollout, deepspeed_config["zero_optimization"].get("stage3_max_live_parameters", 1_000_000_000))
        note = "layer by layer with prefetch"
    return (
        f"gather {gather}: {note}; about {held * dtype.itemsize / GIB:.2f} GiB of gathered weights, before that the "
        f"tower's {tower * dtype.itemsize / GIB:.2f} GiB"
    )


def whole_dim(parameter: torch.nn.Parameter) -> int:
    """Dimensions of a parameter; under ZeRO-3 its own shape is that of a flat shard."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay, norms and biases never do (the reference decays the final norm)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if whole_dim(parameter) > 1]
    vectors = [parameter for parameter in trained if whole_dim(parameter) == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def initialize(
    model: MirageModel, groups: list[dict[str, Any]], train: TrainConfig, deepspeed_config: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """AdamW with float32 masters over `groups`, under ZeRO-3."""
    settings: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "eps": train.eps}
    offload = deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if offload:
        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=get_accelerator().device_name() == "cuda", **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    return engine


def learning_rate(step: int, max_steps: int, train: TrainConfig) -> float:
    """The rate of optimizer step `step` (1-based).

    By default both ends count: the first step has lr / warmup_steps and the last one is above 0. `warmup_from_zero` is
    the reference's schedule, one step behind: the first step has lr 0.
    """
    done = step - 1 if train.warmup_from_zero else step
    end = max_steps if train.warmup_from_zero else max_steps + 1
    if done < train.warmup_steps:
        return train.lr * done / train.warmup_steps
    if train.lr_decay == "constant":
        return train.lr
    return train.lr * (end - done) / (end - train.warmup_steps)
