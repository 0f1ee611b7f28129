"""The parts of a step come from events of the device, and nothing waits for the device between steps that are due.

The device is made up: its queue is a list, in which each piece of work takes as many seconds as it says.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dealt import in_order
from torch.overrides import TorchFunctionMode

from mirage_ds.config import TrainConfig
from mirage_ds.data.steps import Share
from mirage_ds.model.mirage import Losses
from mirage_ds.train_state import TrainState
from mirage_ds.training import device
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.step_clock import StepClock
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed


class Device:
    """A GPU's queue: work that is queued moves its clock, whenever that may be, and the host does not wait."""

    def __init__(self) -> None:
        self.queued_s = 0.0
        self.reads: list[int] = []  # at which step the host waited for an event
        self.step = 0

    def work(self, seconds: float) -> None:
        self.queued_s += seconds

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, on: Device) -> None:
        self.on = on

    def record(self) -> None:
        self.at_s = self.on.queued_s

    def synchronize(self) -> None:
        self.on.reads.append(self.on.step)

    def elapsed_time(self, end_event: "Event") -> float:
        assert self.on.reads[-1:] == [self.on.step], "the device may not be there yet"
        return 1000 * (end_event.at_s - self.at_s)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    gpu = Device()
    accelerator = SimpleNamespace(
        device_name=lambda: "cuda",
        Event=gpu.event,
        max_memory_allocated=lambda: 3 * 2**30,
        max_memory_reserved=lambda: 4 * 2**30,
    )
    monkeypatch.setattr(device, "get_accelerator", lambda: accelerator)
    return gpu


class Engine:
    """Queues 1 s of tower, 2 s of other forward work, 4 s of backward, and 0.5 s of optimizer in each step."""

    def __init__(self, gpu: Device) -> None:
        self.gpu = gpu
        self.tower = torch.nn.Identity()
        self.tower.register_forward_hook(lambda *_: gpu.work(1.0))
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self.skipped_steps = 0

    def __call__(self, **inputs: Any) -> Losses:
        self.tower(torch.zeros(1))
        self.gpu.work(2.0)
        return Losses(*torch.ones(3))

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        self.gpu.work(4.0)

    def step(self) -> None:
        self.gpu.work(0.5)
        self.gpu.step += 1

    def get_global_grad_norm(self) -> float:
        return 1.0


class HostReads(TorchFunctionMode):
    """Notes after which step a tensor's numbers are copied to the host."""

    def __init__(self, gpu: Device) -> None:
        super().__init__()
        self.gpu, self.steps = gpu, set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
            self.steps.add(self.gpu.step)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make(tmp_path: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    for name, value in {"world_size": 1, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr("mirage_ds.training.early_end.only_remember", lambda: None)  # for this process

    def made(steps: int, log_freq: int, accumulation: int = 1) -> Trainer:
        train = TrainConfig(
            stage="text", max_steps=steps, warmup_steps=0, gradient_accumulation_steps=accumulation, log_freq=log_freq
        )
        batch = SimpleNamespace(keys=["a/1"], num_grounded_samples=0, num_tokens=5, num_cells=5, faults=[])
        batch.to = lambda device: batch
        trainer = Trainer(
            Engine(gpu),
            iter([batch] * steps * accumulation),
            in_order(Share(0, 1, 1, accumulation)),
            train,
            Metrics(tmp_path, stage="text", global_batch_size=accumulation, max_steps=steps, log_freq=log_freq),
            TrainState(),
            max_steps=steps,
            device=torch.device("cpu"),
            agree_on_passes=False,
            early_end=EarlyEnd(end_s=None, margin_s=0),
        )
        trainer.clock.watch(trainer.engine.tower, "tower")
        return trainer

    return made


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_parts_are_what_the_device_took(make: Callable[..., Trainer], tmp_path: Path, accumulation: int) -> None:
    make(steps=2, log_freq=1, accumulation=accumulation).train()
    for record in records(tmp_path):
        parts = [record[f"{part}_s"] for part in ("tower", "forward", "backward", "optimizer")]
        assert parts == pytest.approx([accumulation, 2 * accumulation, 4 * accumulation, 0.5])


def test_nothing_is_read_between_steps_that_are_due(make: Callable[..., Trainer], gpu: Device, tmp_path: Path) -> None:
    """Neither an event nor a tensor; then all steps since the last due one are written."""
    trainer = make(steps=10, log_freq=5)
    with HostReads(gpu) as host:
        trainer.train()
    assert set(gpu.reads) == host.steps == {5, 10}
    assert [record["tower_s"] for record in records(tmp_path)] == pytest.approx([1.0] * 10)


def test_a_save_belongs_to_the_step_after_it(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own record is written by then. A forward between two steps belongs to none."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()
    clock.begin()
    assert clock.end().seconds()["save"] == 0
    with clock.host("save"):
        now[0] += 7.0
    with clock.device("forward"):
        gpu.work(1.0)
    clock.begin()
    with clock.host("data"):
        now[0] += 0.25
    seconds = clock.end().seconds()
    assert (seconds["save"], seconds["data"], seconds["forward"]) == (7.0, 0.25, 0.0)
    clock.begin()
    assert clock.end().seconds()["save"] == 0


def test_validation_is_not_the_towers_time(gpu: Device) -> None:
    clock, tower = StepClock(), torch.nn.Identity()
    tower.register_forward_hook(lambda *_: gpu.work(1.0))
    clock.watch(tower, "tower")
    clock.begin()
    tower.eval()(torch.zeros(1))
    tower.train()(torch.zeros(1))
    assert clock.end().seconds()["tower"] == 1.0


def test_the_hosts_clock_where_the_host_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()
    clock.begin()
    with clock.device("backward"):
        now[0] += 0.5
    assert clock.end().seconds()["backward"] == pytest.approx(0.5)
    assert device.peak_bytes() == (0, 0)
    assert device.find_gpu() is None
