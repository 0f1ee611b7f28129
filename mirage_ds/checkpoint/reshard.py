"""Loads a checkpoint of any number of ranks into this run's engine: each rank reads its slices from all old files.

Needs no conversion and no second copy on disk. DeepSpeed's universal checkpoints need both, and DeepSpeed 0.19.8
silently loads them incorrectly: it gives all groups the first group's weight decay, shares one Adam step among all
sub-groups, each of which advances it, and leaves out frozen parameters.
"""

from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

from mirage_ds.checkpoint.partitions import MOMENTS, StoredParameter, stored_moments, stored_parameters
from mirage_ds.model.lora import has_adapter
from mirage_ds.model.mirage import hf_name
from mirage_ds.zero3 import distributed


def load_weights(engine: DeepSpeedEngine, checkpoint: Path, saved_ranks: int) -> None:
    """Loads float32 masters, the weights to compute with, and frozen parameters but those of an adapter's base.

    The optimizer state stays as it is.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    stored, adapter = stored_parameters(checkpoint, saved_ranks), has_adapter(engine.module)
    # As around DeepSpeed's own loading: small parameters, which every rank holds in full, are partitioned for it.
    engine.optimizer.checkpoint_event_prologue()
    for name, parameter in engine.module.named_parameters():
        if adapter and not parameter.requires_grad:
            continue
        part = read_own_part(stored[hf_name(name)], parameter)
        parameter.ds_tensor.data.copy_(part)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, part)
    engine.optimizer.checkpoint_event_epilogue()


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path, saved_ranks: int) -> int:
    """Loads AdamW's moments and its step, and returns the step; groups keep their own learning rate and weight decay.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    moments, step = stored_moments(checkpoint, saved_ranks)
    adam = engine.optimizer.optimizer
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        # Each sub-group needs its own step: every sub-group would advance a shared one.
        adam.state[master] = {key: torch.zeros_like(master) for key in MOMENTS} | {"step": step_for(adam, step, master)}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in MOMENTS:
                part = read_own_part(moments[key][name], parameter)
                safe_set_local_optimizer_state(parameter, part, key)
    return step


def step_for(adam: torch.optim.Optimizer, step: int, master: torch.Tensor) -> int | torch.Tensor:
    """The step in the optimizer's form: a number for DeepSpeed's, a tensor for torch's, on the GPU if it is fused."""
    if isinstance(adam, DeepSpeedCPUAdam):
        return step
    return torch.tensor(float(step), device=master.device if adam.defaults["fused"] else "cpu")


def read_own_part(stored: StoredParameter, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Reads this rank's partition of a parameter, as ZeRO-3 makes it: the last rank's is padded with zeros."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # ZeRO-3 adds it
    return stored.read_part(distributed.rank() * numel, numel)
