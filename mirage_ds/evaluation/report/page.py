"""The report's HTML: one file that needs nothing else, from templates that escape every text."""

from collections.abc import Sequence
from dataclasses import dataclass

from mirage_ds.evaluation.latents.heat import COLORS
from mirage_ds.evaluation.report.contents import ArmResult, Contents, Estimate
from mirage_ds.evaluation.report.html import REPORT, render_page


@dataclass(frozen=True)
class Axis:
    """Where numbers lie on a drawing of 100 units of width."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)


def render(contents: Contents) -> str:
    """The page."""
    return render_page(
        REPORT,
        "page.html",
        "page.js",
        {"reading": reading},
        page=contents,
        axis=axis_of(contents.arms),
        heat_colors=[f"rgb{color}" for color in COLORS],
        Axis=Axis,
    )


def axis_of(arms: Sequence[ArmResult]) -> Axis:
    """The axis of all differences, 0 in its middle; without a task, that of the shares of changed answers."""
    ends = [abs(end) for arm in arms if arm.difference for end in (arm.difference.low, arm.difference.high)]
    reach = max(ends, default=0)
    return Axis(-reach, reach) if reach else Axis(0, 1)


def reading(difference: Estimate) -> str:
    """What an interval says of own states against replaced ones."""
    if difference.high < 0:
        return "own is better"
    return "own is worse" if difference.low > 0 else "no difference is shown"
