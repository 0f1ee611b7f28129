"""The process group: this rank's place in it, and the few collectives that are used."""

import os
import socket
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.errors import DeviceError
from mirage_ds.programs import ask


def map_launcher_variables() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not.

    DeepSpeed's launcher and torchrun set them all. srun sets its own: a rank is a task of the step. Without a launcher
    the run is one process.
    """
    environment = os.environ
    if "RANK" in environment:
        return
    if "SLURM_STEP_NUM_TASKS" in environment and int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
        # Every task computes the same port, and two jobs on one node compute different ones.
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000))
        return
    environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(_free_port()))


def _first_host(nodelist: str) -> str:
    """Where rank 0 runs. Only scontrol reads all forms of SLURM's node lists, such as node[1-2,7]."""
    return ask("scontrol", "show", "hostnames", nodelist).stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def take_device(num_devices: int) -> int:
    """The number of this rank's GPU among the `num_devices` that it sees: its own alone, or those of its node.

    LOCAL_RANK becomes that number, as DeepSpeed takes LOCAL_RANK for it (comm/torch.py, init_process_group;
    runtime/zero/partition_parameters.py, Init). The number of the rank on its node stays in MIRAGE_LOCAL_RANK.

    Raises:
        DeviceError: there are several GPUs, but fewer than ranks, or none.
    """
    local_rank = os.environ["LOCAL_RANK"]
    device = 0 if num_devices == 1 else int(local_rank)
    if device >= num_devices:
        raise no_device(f"it is number {local_rank} of its node, counted from 0, and sees {num_devices} GPUs")
    os.environ.update(LOCAL_RANK=str(device), MIRAGE_LOCAL_RANK=local_rank)
    return device


def no_device(reason: str) -> DeviceError:
    """The error of a rank without a GPU of its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    return DeviceError(
        f"rank {os.environ['RANK']} has no GPU of its own (on {socket.gethostname()}, CUDA_VISIBLE_DEVICES {visible}): "
        f"{reason}; each rank needs one, and may see that one alone or all GPUs of its node; start as many ranks per "
        "node as it has GPUs, or make more GPUs visible"
    )


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
