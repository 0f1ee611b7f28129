"""Seconds of the parts of a step.

data       the host waits for the micro-batches of the next step
tower      the vision tower, forward
forward    the rest of forward, with the wait for gathered weights
backward   with recomputation, and with the reduction of gradients as far as it ends there
optimizer  the rest of the reduction, the norm of the gradient, the update
save       training waits for the checkpoint before this step

Data and save are read from the host's clock. The others are spans between two events in the device's queue, so that the
host waits for nothing: they are read when the step is written. The parts do not overlap. What they leave of a step
(copies to the device, agreeing on the end, writing records) belongs to none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mirage_ds.training.device import Event, record_event

PARTS = ("data", "tower", "forward", "backward", "optimizer", "save")
OWN = ("data", "tower", "rollout")
"""What a rank does without the others: no collective is inside. The rollout is a part of forward."""


@dataclass
class StepTimes:
    """The spans of one step, which the device may not have reached yet."""

    spans: list[tuple[str, Event, Event]] = field(default_factory=list)
    host_s: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Each of PARTS and OWN; waits until the device has reached the end of the last span."""
        if self.spans:
            self.spans[-1][2].synchronize()
        seconds = dict.fromkeys((*PARTS, *OWN), 0.0) | self.host_s
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1000
        seconds["forward"] -= seconds["tower"]
        return seconds


class StepClock:
    """Marks the parts of the step under way."""

    def __init__(self) -> None:
        self.times = StepTimes()

    def begin(self) -> None:
        """A step begins. What was marked since the last one ended belongs to no step, except a save."""
        self.times = StepTimes(host_s={"save": self.times.host_s.get("save", 0.0)})

    def end(self) -> StepTimes:
        """The step has ended."""
        times, self.times = self.times, StepTimes()
        return times

    @contextmanager
    def host(self, part: str) -> Iterator[None]:
        """What the host waits for."""
        start_s = time.perf_counter()
        yield
        self.times.host_s[part] = self.times.host_s.get(part, 0.0) + time.perf_counter() - start_s

    @contextmanager
    def device(self, part: str) -> Iterator[None]:
        """What the device computes."""
        start = record_event()
        yield
        self.times.spans.append((part, start, record_event()))

    def watch(self, module: torch.nn.Module, part: str) -> None:
        """Every forward of `module` in training is such a part.

        To be called after DeepSpeed has put its hooks on the module: they gather its weights first.
        """
        begun: list[Event] = []

        def begin(module: torch.nn.Module, inputs: Any) -> None:
            if module.training:
                begun.append(record_event())

        def end(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if module.training:
                self.times.spans.append((part, begun.pop(), record_event()))

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
