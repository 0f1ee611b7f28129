"""Compares what we compute with the reference's numbers, and keeps the worst deviation of each quantity for the table.

tests/conftest.py prints the table after any session that compared something.
"""

import math
import platform
from dataclasses import astuple, dataclass
from datetime import date
from importlib.metadata import version
from typing import Any, Literal

import torch

Measure = Literal["absolute", "relative", "relative to the largest"]
EXACT = "exact"


@dataclass
class Deviation:
    """The worst of all comparisons of one quantity."""

    measure: str
    tolerance: float
    values: int = 0
    worst: float = 0.0


seen: dict[str, Deviation] = {}
"""By quantity, in the order of the first comparison."""


def check(quantity: str, actual: Any, expected: Any, tolerance: float, measure: Measure, name: str = "") -> None:
    """Asserts that numbers (tensors, lists or single ones) deviate by at most `tolerance`, and records by how much.

    `absolute`: |actual - expected|; `relative`: that over |expected|, value by value; `relative to the largest`: that
    over the largest |expected|. `name` says in the message which of several it was.
    """
    ours = torch.as_tensor(actual).detach().double()
    reference = torch.as_tensor(expected).detach().double()
    assert ours.shape == reference.shape, f"{quantity} {name}"
    difference = (ours - reference).abs()
    if measure == "relative":
        difference = torch.where(difference == 0, 0.0, difference / reference.abs())
    elif measure == "relative to the largest":
        difference = difference / reference.abs().max()
    worst = difference.max().item()
    _record(quantity, measure, tolerance, worst, reference.numel())
    assert worst <= tolerance, f"{quantity} {name}: {worst:.2e} {measure}, and at most {tolerance:.0e} is allowed"


def check_equal(quantity: str, actual: Any, expected: Any) -> None:
    """Asserts that two texts (each counts as one value), lists or tensors are equal, and records it."""
    values = 1 if isinstance(expected, str) else torch.as_tensor(expected).numel()
    if isinstance(expected, torch.Tensor):
        actual, expected = actual.tolist(), expected.tolist()
    _record(quantity, EXACT, 0.0, float(actual != expected), values)
    assert actual == expected


def as_lists() -> list[list[Any]]:
    """All comparisons of this process, for `merge` in another one."""
    return [[quantity, *astuple(entry)] for quantity, entry in seen.items()]


def merge(compared: list[list[Any]]) -> None:
    """Adds the comparisons of another process."""
    for quantity, measure, tolerance, values, worst in compared:
        _record(quantity, measure, tolerance, worst, values)


def _record(quantity: str, measure: str, tolerance: float, worst: float, values: int) -> None:
    entry = seen.setdefault(quantity, Deviation(measure, tolerance))
    assert (entry.measure, entry.tolerance) == (measure, tolerance), f"{quantity} is compared in two ways"
    entry.values += values
    if not (worst <= entry.worst or math.isnan(entry.worst)):  # NaN is the worst of all
        entry.worst = worst


def table() -> list[str]:
    """Lines of Markdown: what was compared, how, how closely, and on which versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    lines = [
        f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, {packages}",
        "",
        "| quantity | values | deviation | tolerance | worst |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for quantity, entry in seen.items():
        if entry.measure == EXACT:
            limits = "0 | 0" if entry.worst == 0 else "0 | DIFFERENT"
        else:
            limits = f"{entry.tolerance:.0e} | {entry.worst:.1e}"
        lines.append(f"| {quantity} | {entry.values} | {entry.measure} | {limits} |")
    return lines
