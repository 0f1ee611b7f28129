"""A checkpoint of any number of ranks -> this run's engine: each rank reads its slices from all the old ranks' files.

No conversion comes before it and no second copy on the disk. DeepSpeed's universal checkpoints need both, and 0.19.8
loads them wrongly without a word: the first group's weight decay on all groups, one Adam step for all sub-groups,
advanced by each, and no frozen parameters.
"""

from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

from mirage_ds.checkpoint.partitions import MOMENTS, StoredParameter, stored_moments, stored_parameters
from mirage_ds.model.mirage import hf_name
from mirage_ds.zero3 import distributed


def load_weights(engine: DeepSpeedEngine, checkpoint: Path, saved_ranks: int) -> None:
    """Float32 masters, what is computed with, and what is frozen; the optimizer's state stays as it is.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    stored = stored_parameters(checkpoint, saved_ranks)
    # What DeepSpeed does around a load of its own: small parameters, which every rank holds whole, are cut and joined.
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in engine.module.named_parameters():
        part = read_own_part(stored[hf_name(name)], parameter)
        parameter.ds_tensor.data.copy_(part)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, part)
    engine.optimizer.checkpoint_event_epilogue()


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path, saved_ranks: int) -> int:
    """AdamW's moments and its step, which is returned; the groups keep their own learning rate and weight decay.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    moments, step = stored_moments(checkpoint, saved_ranks)
    adam = engine.optimizer.optimizer
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        # Each sub-group has a step of its own: a shared one would be advanced by every sub-group.
        adam.state[master] = {key: torch.zeros_like(master) for key in MOMENTS} | {"step": step_for(adam, step, master)}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in MOMENTS:
                part = read_own_part(moments[key][name], parameter)
                safe_set_local_optimizer_state(parameter, part, key)
    return step


def step_for(adam: torch.optim.Optimizer, step: int, master: torch.Tensor) -> int | torch.Tensor:
    """The step as an optimizer keeps it: DeepSpeed's as a number, torch's as a tensor, on the GPU if it is fused."""
    if isinstance(adam, DeepSpeedCPUAdam):
        return step
    return torch.tensor(float(step), device=master.device if adam.defaults["fused"] else "cpu")


def read_own_part(stored: StoredParameter, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's slice of a parameter's elements, the last ones padded with zeros, as ZeRO-3 cuts them."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # ZeRO-3 adds it
    return stored.read_part(distributed.rank() * numel, numel)
