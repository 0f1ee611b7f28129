"""Success rates with their 95% intervals, and differences of rates over the same rows.

A row's score is the mean of the scores of its answers. Rows that could not be scored are left out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.bootstrap import mean_interval
from mirage_ds.evaluation.groups import grouped
from mirage_ds.evaluation.tasks.outcome import INVALID, Outcome

Rate = dict[str, Any]
"""{"rate": the mean of the rows' scores, "low", "high": its 95 % interval, "num_rows"}."""
Rates = dict[str, Rate]
"""{way of scoring: Rate}."""

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


def success_rates(answers: Sequence[Answer]) -> Rates:
    """The rate by way of scoring; empty if no row could be scored."""
    return {way: rate_of(row_scores(answers, way).values()) for way in ways_of(answers)}


def group_rates(answers: Iterable[Answer], by: str | None = None) -> dict[str, Rates]:
    """The rates of each group; one of which no row could be scored is left out.

    Args:
        by: a field of the rows; None: their level.
    """
    rates = {name: success_rates(part) for name, part in grouped(answers, by).items()}
    return {name: part for name, part in rates.items() if part}


def most_frequent(answers: Iterable[Answer]) -> tuple[str, float] | None:
    """The right answer that most scored rows have, and the rate of always giving it; None if rows have no single one.

    By the first way of scoring.
    """
    expected = {answer.number: first_of(answer).expected for answer in answers if answer.scores}
    if not expected or not all(expected.values()):
        return None
    ((right, count),) = Counter(expected.values()).most_common(1)
    return right, count / len(expected)


def num_invalid(answers: Iterable[Answer]) -> int:
    """How many answers have a wrong form, by the first way of scoring."""
    return sum(first_of(answer).status == INVALID for answer in answers if answer.scores)


def num_cut_off(answers: Iterable[Answer]) -> int:
    """How many answers never ended: max_new_tokens cut them off."""
    return sum(not answer.complete for answer in answers)


def num_differing(ours: Iterable[Answer], theirs: Iterable[Answer]) -> int:
    """How many of our answers `differ` from theirs."""
    return sum(differ(our, their) for our, their in paired(ours, theirs))


def paired(ours: Iterable[Answer], theirs: Iterable[Answer]) -> list[tuple[Answer, Answer]]:
    """Each of our answers with theirs of the same sample to the same row, where there is one."""
    found = {(answer.number, answer.sample): answer for answer in theirs}
    return [(our, found[key]) for our in ours if (key := (our.number, our.sample)) in found]


def differ(our: Answer, their: Answer) -> bool:
    """Whether they give something else; whether their texts are not the same, where one of them gives nothing."""
    given = [first_of(answer).given if answer.scores else "" for answer in (our, their)]
    return given[0] != given[1] if all(given) else our.text != their.text


def first_of(answer: Answer) -> Outcome:
    """The outcome to quote of a scored answer."""
    return next(iter(answer.scores.values()))


def ways_of(answers: Iterable[Answer]) -> list[str]:
    """The ways of scoring, the one to quote first; none if no answer is scored."""
    return next((list(answer.scores) for answer in answers if answer.scores), [])


def row_scores(answers: Iterable[Answer], way: str) -> dict[int, float]:
    """The mean score of each row's answers, by the number of the row, in order."""
    by_row: dict[int, list[float]] = {}
    for answer in answers:
        if answer.scores:
            by_row.setdefault(answer.number, []).append(float(answer.scores[way].success))
    return {number: sum(scores) / len(scores) for number, scores in sorted(by_row.items())}


def rate_of(scores: Collection[float]) -> Rate:
    """The mean of the rows' scores with its interval: Wilson's where each is 0 or 1, otherwise by bootstrap."""
    if set(scores) <= {0, 1}:
        low, high = wilson_interval(int(sum(scores)), len(scores))
    else:
        low, high = mean_interval(list(scores))
    return {"rate": sum(scores) / len(scores), "low": low, "high": high, "num_rows": len(scores)}


@dataclass(frozen=True)
class Difference:
    """One mean score minus another over the same rows, and its 95 % interval; 0.01 is one point."""

    value: float
    low: float
    high: float
    num_rows: int  # that are scored in both
    gained: int  # rows with a higher score in ours
    lost: int  # rows with a lower one

    def __str__(self) -> str:
        value, low, high = (f"{100 * part:+.1f}" for part in (self.value, self.low, self.high))
        return f"{value} points (95% interval {low} to {high})"


def group_differences(ours: Iterable[Answer], theirs: Iterable[Answer], by: str | None = None) -> dict[str, Difference]:
    """The difference in each group; one of which no row could be scored is left out."""
    their = grouped(theirs, by)
    return {name: difference(part, their[name]) for name, part in grouped(ours, by).items() if ways_of(part)}


def difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Difference:
    """The rate of our answers minus that of theirs to the same rows, by the first way of scoring; NaN without rows.

    The interval is a paired bootstrap over rows: each resample draws rows, with both their scores. So only the rows
    where the two differ widen it, and it covers the choice of the rows, not that of the model or of the seed. One row
    that gains all and one that loses all are added, without which it is too short where few rows differ, and a point
    where none does. Bonett and Price (2012) add the same two to Wald's interval.
    """
    way = ways_of(ours)[0]
    our, their = row_scores(ours, way), row_scores(theirs, way)
    changes = [score - their[number] for number, score in our.items() if number in their]
    if not changes:
        return Difference(nan, nan, nan, 0, 0, 0)
    scores = [*our.values(), *their.values()]
    most = max(1.0, *scores) - min(0.0, *scores)  # that a row can gain, as far as is known
    return Difference(
        sum(changes) / len(changes),
        *mean_interval([*changes, most, -most]),
        len(changes),
        sum(change > 0 for change in changes),
        sum(change < 0 for change in changes),
    )
