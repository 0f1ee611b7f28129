"""What the launcher tells a rank: its number, where rank 0 is, its GPU. Needs no torch."""

import os
import socket

from mirage_ds.errors import DeviceError
from mirage_ds.programs import ask


def map_launcher_variables() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not.

    DeepSpeed's launcher and torchrun set them all; srun's are mapped. Without a launcher the run is one process.
    """
    environment = os.environ
    map_slurm_variables()
    if "RANK" not in environment:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))


def map_slurm_variables() -> None:
    """Sets the five variables from those of srun: a rank is a task of its step. Nothing without such a step."""
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
    # Every task computes the same port, and two jobs on one node compute different ones.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000))


def _first_host(nodelist: str) -> str:
    """Where rank 0 runs. Only scontrol reads all forms of SLURM's node lists, such as node[1-2,7]."""
    return ask("scontrol", "show", "hostnames", nodelist).stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
