"""Which GPU a rank takes: with DeepSpeed's own code for GPUs, on a machine that only seems to have some."""

import os
from pathlib import Path

import deepspeed.accelerator
import launching
import pytest
import torch
import torch.distributed
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from mirage_ds import launcher
from mirage_ds.errors import DeviceError
from mirage_ds.zero3 import distributed

DUPLICATE = (
    "NCCL error: invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1d000"
)


def join(num_devices: int) -> None:
    """Joins a process group that is none; prints which device is set, and which one NCCL and ZeRO-3 would use."""
    chosen = [0]
    torch.cuda.device_count = lambda: num_devices
    torch.cuda.set_device = lambda device: (chosen.append(torch.device("cuda", device).index), print("device", device))
    torch.cuda.current_device = lambda: chosen[-1]
    torch.distributed.init_process_group = lambda backend, device_id, **more: print(backend, device_id)
    torch.distributed.get_backend = lambda: "nccl"
    torch.distributed.get_world_size = lambda group=None: 4
    real_accelerator.ds_accelerator = CUDA_Accelerator()
    device = distributed.init(timeout_s=1)
    # as runtime/zero/partition_parameters.py and runtime/zero/utils.py of DeepSpeed compute it
    zero = deepspeed.accelerator.get_accelerator().device_name(os.environ["LOCAL_RANK"])
    print(f"training {device}, ZeRO-3 {zero}")


@pytest.mark.parametrize(
    ("num_devices", "number"), [(1, 0), (4, 2)], ids=["its own alone is visible", "all of the node are visible"]
)
def test_one_device_for_all(tmp_path: Path, num_devices: int, number: int) -> None:
    """The device is set before NCCL starts, which would otherwise take GPU 0 of each node."""
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with launching.start(1, num_devices, main=join, log=tmp_path / "log", variables=place) as rank:
        output = rank.finish(timeout_s=300)
    lines = [line for line in output.splitlines() if line.startswith(("device", "nccl", "training"))]
    assert lines == [f"device {number}", f"nccl cuda:{number}", f"training cuda:{number}, ZeRO-3 cuda:{number}"]


@pytest.fixture
def rank_5(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    environment = {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    monkeypatch.setattr("os.environ", environment)
    return environment


@pytest.mark.parametrize("num_devices", [0, 4])
def test_a_rank_without_a_device(rank_5: dict[str, str], num_devices: int) -> None:
    words = rf"rank 13 has .*CUDA_VISIBLE_DEVICES 0,1,2,3\): .*number 5 .*sees {num_devices} GPUs; each .*; start"
    with pytest.raises(DeviceError, match=words) as error:
        launcher.take_device(num_devices)
    assert error.value.exit_code == 1  # as of a node that has lost a GPU: SLURM jobs start again, on others


def test_two_ranks_on_one_device(rank_5: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several ranks sees one GPU, and it is the same: only NCCL can tell."""

    def refuse(message: str) -> None:
        raise torch.distributed.DistBackendError(message)

    monkeypatch.setattr(distributed.deepspeed, "init_distributed", lambda **settings: refuse(DUPLICATE))
    with pytest.raises(DeviceError, match=r"rank 13 has no GPU .*shares its GPU with another rank; each .*; start"):
        distributed.init(timeout_s=1)
    monkeypatch.setattr(distributed.deepspeed, "init_distributed", lambda **settings: refuse("ncclSystemError"))
    with pytest.raises(torch.distributed.DistBackendError, match="ncclSystemError"):
        distributed.init(timeout_s=1)
