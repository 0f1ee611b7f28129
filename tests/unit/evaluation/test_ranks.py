"""Which GPU a rank of an evaluation takes, on a machine that only seems to have some; alone without a launcher."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mirage_ds.errors import DeviceError
from mirage_ds.evaluation import ranks
from mirage_ds.evaluation.ranks import Ranks


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets how many GPUs a rank sees, and their ids; returns the GPUs that were made the current one."""
    chosen: list[int] = []

    def seems(local_rank: str, ids: list[str]) -> list[int]:
        monkeypatch.setattr("os.environ", {"RANK": "1", "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(ids))
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=ids[number]))
        return chosen

    return seems


def take(others: str) -> None:
    """As the second of two ranks of a machine, whose first has the GPU `others`, and no error."""
    ranks._take_gpu(Ranks(1, 2, lambda own: [(own[0], others) if isinstance(own, tuple) else None, own]))


@pytest.mark.parametrize(("ids", "number"), [(["a", "b"], 1), (["b"], 0)])
def test_a_gpu_of_its_own(machine, ids: list[str], number: int) -> None:
    """Each rank sees all GPUs of its node, or its own alone."""
    chosen = machine("1", ids)
    take("a")
    assert chosen == [number]


def test_no_gpu_of_its_own(machine) -> None:
    machine("2", ["a", "b"])
    with pytest.raises(DeviceError, match=r"rank 1 has no GPU of its own .* number 2 of its node.* sees 2 GPUs"):
        take("a")
    machine("1", ["a"])
    with pytest.raises(DeviceError, match="shares its GPU with another rank"):
        take("a")


def test_one_process_is_no_group() -> None:
    """Nor does it load torch, so that a mistake is said at once."""
    program = "import sys; from mirage_ds.evaluation.ranks import join; print(join().size, 'torch' in sys.modules)"
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | {"PYTHONPATH": ":".join(sys.path)}, capture_output=True
        )
        assert done.stdout.decode().split() == ["1", "False"], done.stderr
