"""The process group: this rank's place in it, and the few collectives that are used."""

from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.launcher import map_launcher_variables, no_device, take_device


def init(timeout_s: int) -> torch.device:
    """Joins the process group; a collective that waits longer than `timeout_s` ends this rank. Returns its device.

    Raises:
        DeviceError: this rank has no GPU of its own.
    """
    map_launcher_variables()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed's all-reduce through shared memory, which g++ would compile at the first start; gloo replaces it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(take_device(accelerator.device_count()))
    try:
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    except torch.distributed.DistBackendError as error:
        if "Duplicate GPU" not in str(error):  # NCCL's words
            raise
        raise no_device("it shares its GPU with another rank") from error
    return torch.device(accelerator.current_device_name())


def shut_down() -> None:
    """Leaves the process group."""
    torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank()


def world_size() -> int:
    return torch.distributed.get_world_size()


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    torch.distributed.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Adds `values` over the ranks, in place."""
    torch.distributed.all_reduce(values)
    return values


def max_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """Element by element, the largest value over the ranks."""
    agreed = torch.tensor(values, device=device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    return agreed.tolist()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
