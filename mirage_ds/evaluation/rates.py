"""Success rates by level, with their 95% intervals and their table; differences of rates over the same rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from rich.table import Table

from mirage_ds.evaluation.answers import Answer

Rates = dict[str, dict[str, dict[str, Any]]]
"""{group: {way of scoring: {"rate", "low", "high", "num_rows"}}}, with the group "all" last."""

Z_95 = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score: it holds for few rows and for rates near 0 and 1 too.

    All p with (rate - p)^2 <= z^2 p (1 - p) / total: the two roots of a quadratic equation.
    """
    assert 0 <= successes <= total > 0
    rate, weight = successes / total, Z_95**2 / total
    centre = rate + weight / 2
    half = sqrt(weight * (rate * (1 - rate) + weight / 4))
    # Rounding could put the ends for 0 of n and n of n slightly outside of 0 and 1.
    return max(0.0, (centre - half) / (1 + weight)), min(1.0, (centre + half) / (1 + weight))


def success_rates(answers: Iterable[Answer]) -> Rates:
    """The share of right answers by level and way of scoring, with its 95 % interval."""
    answers = list(answers)
    names = sorted({level_of(answer) for answer in answers}, key=lambda level: (len(level), level))
    levels = {name: [answer for answer in answers if level_of(answer) == name] for name in names} | {"all": answers}
    return {level: {way: _rate(part, way) for way in part[0].scores} for level, part in levels.items()}


def level_of(answer: Answer) -> str:
    """The side of a row's map; the row's own `level` if it has no map."""
    map_desc = answer.row.get("map_desc")
    return str(len(map_desc) if isinstance(map_desc, list) else answer.row.get("level", "-"))


def _rate(answers: Sequence[Answer], way: str) -> dict[str, Any]:
    successes = sum(answer.scores[way].success == 1 for answer in answers)
    low, high = wilson_interval(successes, len(answers))
    return {"rate": successes / len(answers), "low": low, "high": high, "num_rows": len(answers)}


@dataclass(frozen=True)
class Difference:
    """One rate minus another over the same rows, as a fraction, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{100 * part:+.1f}" for part in (self.value, self.low, self.high))
        return f"{value} points (95% interval {low} to {high})"


def difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Difference:
    """The rate of our answers minus that of theirs to the same rows in the same order, by the first way of scoring.

    Only the rows where the two differ widen the interval. It is that of Bonett and Price (2012): Wald's interval, with
    one row added that only ours solve and one that only theirs solve, so that it holds for few rows too.
    """
    way = next(iter(ours[0].scores))
    pairs = [
        (our.scores[way].success == 1, their.scores[way].success == 1) for our, their in zip(ours, theirs, strict=True)
    ]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    total = len(pairs) + 2
    centre, discordant = (gained - lost) / total, (gained + lost + 2) / total
    half = Z_95 * sqrt((discordant - centre**2) / total)
    return Difference((gained - lost) / len(pairs), max(-1.0, centre - half), min(1.0, centre + half))


def table(rates: Rates, title: str) -> Table:
    """Rates by level, each with its 95 % interval."""
    drawn = Table(title=title)
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
