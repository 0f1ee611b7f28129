"""Success rates by level, with their 95% intervals, and their table."""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any

from rich.table import Table

from mirage_ds.config import TaskName
from mirage_ds.inference.results import Answer, Rates

Z_95 = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score: sound for few samples and for rates near 0 and 1.

    All p with (rate - p)^2 <= z^2 p (1 - p) / total: the two roots of a quadratic equation.
    """
    assert 0 <= successes <= total > 0
    rate, weight = successes / total, Z_95**2 / total
    centre = rate + weight / 2
    half = sqrt(weight * (rate * (1 - rate) + weight / 4))
    # Rounding would leave the ends of 0 of n and n of n a hair outside.
    return max(0.0, (centre - half) / (1 + weight)), min(1.0, (centre + half) / (1 + weight))


def success_rates(answers: Iterable[Answer]) -> Rates:
    """The share of right answers, and its 95 % interval."""
    answers = list(answers)
    names = sorted({answer.level for answer in answers}, key=lambda level: (len(level), level))
    levels = {name: [answer for answer in answers if answer.level == name] for name in names} | {"all": answers}
    return {level: {way: _rate(part, way) for way in part[0].scores} for level, part in levels.items()}


def _rate(answers: Sequence[Answer], way: str) -> dict[str, Any]:
    successes = sum(answer.scores[way].success for answer in answers)
    low, high = wilson_interval(successes, len(answers))
    return {"rate": successes / len(answers), "low": low, "high": high, "num_rows": len(answers)}


def table(rates: Rates, task: TaskName) -> Table:
    """Rates by level, each with its 95 % interval."""
    drawn = Table(title=task)
    ways = list(rates["all"])
    for heading in ("level", "rows", *(text for way in ways for text in (way, "95% interval"))):
        drawn.add_column(heading, justify="right")
    for level, by_way in rates.items():
        if level == "all":
            drawn.add_section()
        figures = [text for way in ways for text in _figures(by_way[way])]
        drawn.add_row(level, str(by_way[ways[0]]["num_rows"]), *figures)
    return drawn


def _figures(rate: dict[str, Any]) -> tuple[str, str]:
    return f"{rate['rate']:.1%}", f"{rate['low']:.1%} - {rate['high']:.1%}"
