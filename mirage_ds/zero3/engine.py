"""Makes the DeepSpeed engine: what ZeRO-3 gathers as one unit, which parameters decay, the learning rate."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_module
from torch.utils import cpp_extension

from mirage_ds.config import Config, TrainConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.mirage import MirageModel
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.layer_gathering import gather, gather_groups

GIB = 2**30
BUILD_S = 600  # longer than any op takes to compile


def choose_gather(config: Config) -> str:
    """What ZeRO-3 gathers as one unit: `layer` for one pass (overlaps with computation), `rollout` for several."""
    if config.model.gather != "auto":
        return config.model.gather
    return "rollout" if config.several_passes else "layer"


def mark_gather_units(model: MirageModel, config: Config) -> None:
    """Marks ZeRO-3's leaf modules: always the tower and the loss head; for `rollout`, also the rollout.

    Inside a leaf module there are no collectives, so ranks may do different work there. With one pass, `layer` makes
    each decoder layer one, so that DeepSpeed's hooks run once per layer instead of once per matrix. With several, the
    layers have no hooks: the rollout gathers them by groups, see `gather_groups`; with `layer` each is a group.
    """
    gather, head = choose_gather(config), model.rollout.head
    for module in (model.tower, head):
        set_z3_leaf_module(module, True)
    set_z3_leaf_module(model.rollout, gather == "rollout")
    if gather == "rollout":
        model.register_forward_pre_hook(gather_tower)  # before DeepSpeed's own hooks, which come later
    elif config.several_passes:
        model.rollout.divide(config.model.gather_layers if gather == "groups" else 1)
    for layer in model.rollout.layers:
        set_z3_leaf_module(layer, gather == "layer" and not config.several_passes)
    if head.shared:
        unit = model.rollout if gather == "rollout" else head
        for weight in head.weights:
            deepspeed.zero.register_external_parameter(unit, weight)


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the full parameter; under ZeRO-3 this rank holds only a shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def describe_gather(model: MirageModel, gather: str, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> str:
    """What ZeRO-3 gathers and the memory for it, for the start of the log."""
    # A set: an untied head's weight is both among the parameters and in `head.weights`.
    rollout = sum(whole_numel(parameter) for parameter in {*model.rollout.parameters(), *model.rollout.head.weights})
    tower = sum(whole_numel(parameter) for parameter in model.tower.parameters())
    if gather == "rollout":
        size = rollout * dtype.itemsize / GIB
        how = "as one, while the tower runs, whatever K"
        memory = f"about {size:.2f} GiB, up to {2 * size:.2f} GiB while gathering"
    elif model.rollout.divided:
        groups = [sum(map(whole_numel, layers.parameters())) for layers in model.rollout.grouped_layers()]
        how = f"by groups of layers ({len(groups)}), each again in every pass, forward and backward"
        memory = f"up to {sum(sorted(groups)[-2:]) * dtype.itemsize / GIB:.2f} GiB, the group in use and the next one"
    else:
        # 1e9 is DeepSpeed's default
        held = min(rollout, deepspeed_config["zero_optimization"].get("stage3_max_live_parameters", 1_000_000_000))
        how = "layer by layer, with prefetch"
        memory = f"about {held * dtype.itemsize / GIB:.2f} GiB"
    return (
        f"Gathers the decoder {how} (model.gather={gather}): {memory}; before it the tower: "
        f"{tower * dtype.itemsize / GIB:.2f} GiB"
    )


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's weights, the same on every rank and for every number of ranks; all of them call it."""
    digest = hashlib.sha256()
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        for parameter in module.parameters() if distributed.is_main() else ():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return distributed.gather(digest.hexdigest())[0]


def whole_dim(parameter: torch.nn.Parameter) -> int:
    """Number of dimensions of the full parameter; under ZeRO-3 it has the shape of a flat shard."""
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
        wait_for_build("cpu_adam")
        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=get_accelerator().device_name() == "cuda", **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    if model.rollout.divided:
        gather_groups(model.rollout)
    return engine


def gather_tower(model: MirageModel, inputs: Any) -> None:
    """Gathers the tower by itself, before DeepSpeed's hook of the whole model prefetches what comes next.

    DeepSpeed would gather tower, embeddings and rollout in one operation, and the tower would wait for all of it.
    """
    for handle in gather(list(model.tower.parameters())):
        handle.wait()


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drops what backward has accumulated since the last step, as if it had not been called.

    DS stage3.py: with `micro_step_id` 0, which `zero_grad` sets, the next backward copies its gradients over those in
    the flat buffer instead of adding them. The buffer is cleared too, for parameters that get no gradient then.
    """
    engine.optimizer.zero_grad()
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def future_moments(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """Memory of the size of AdamW's moments, if its first step will make them on the device."""
    zero = engine.optimizer
    if zero.optimizer.state or zero.offload_optimizer:
        return []
    return [torch.empty_like(masters) for masters in zero.fp32_partitioned_groups_flat for _ in range(2)]


def wait_for_build(op: str) -> None:
    """Waits while another process compiles an op of DeepSpeed; torch alone would wait for a killed one for ever.

    Raises:
        ConfigError: the lock of the build is older than any build takes.
    """
    lock = Path(cpp_extension._get_build_directory(op, verbose=False)) / "lock"
    while lock.exists():
        with suppress(FileNotFoundError):  # the build has just ended
            if time.time() - lock.stat().st_mtime > BUILD_S:
                raise ConfigError(
                    f"the build of DeepSpeed's op {op} has been locked for more than {BUILD_S // 60} minutes ({lock}); "
                    f"a build takes a minute or two, and a killed one leaves its lock; delete it: rm {lock}"
                )
        time.sleep(1)


def learning_rate(step: int, max_steps: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (1-based).

    By default the first step has lr / warmup_steps and the last one is above 0. `warmup_from_zero` is the reference's
    schedule, one step behind: the first step has lr 0.
    """
    done = step - 1 if train.warmup_from_zero else step
    end = max_steps if train.warmup_from_zero else max_steps + 1
    if done < train.warmup_steps:
        return train.lr * done / train.warmup_steps
    if train.lr_decay == "constant":
        return train.lr
    return train.lr * (end - done) / (end - train.warmup_steps)
