"""What an evaluation prints, and the numbers of its summary: the arms, groups of rows, several answers to a row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.groups import grouped
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.rates import (
    Difference,
    Rate,
    Rates,
    difference,
    first_of,
    group_differences,
    group_rates,
    most_frequent,
    num_cut_off,
    num_differing,
    num_invalid,
    success_rates,
    ways_of,
)
from mirage_ds.evaluation.samples import sample_rates
from mirage_ds.evaluation.scoring import Task
from mirage_ds.evaluation.tasks.outcome import INVALID

BRACKETS = "in brackets: 95% intervals"


def summary_of(answers: dict[str, list[Answer]], task: Task, by: str | None = None) -> dict[str, Any]:
    """The numbers of FILE.summary.json, by arm.

    Args:
        answers: of each arm, `own` first.
        by: the field of the rows by which rates are grouped; None: their level.
    """
    samples = sample_rates(answers)
    arms = {name: _summary(arm, answers[OWN], task, by, samples[name]) for name, arm in answers.items()}
    summary: dict[str, Any] = {"task": task.name, "by": by, "arms": arms}
    if found := most_frequent(answers[OWN]):
        summary["always_the_most_frequent"] = {"answer": found[0], "rate": found[1]}
    return summary


def _summary(arm: list[Answer], own: list[Answer], task: Task, by: str | None, samples: Rates) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "num_answers": len(arm),
        "num_unscored": sum(bool(answer.unscored) for answer in arm),
        "num_cut_off": num_cut_off(arm),
        "num_with_block": sum(answer.num_blocks > 0 for answer in arm),
        "num_latents": sum(answer.num_latents for answer in arm),
        "num_replaced": sum(answer.num_replaced for answer in arm),
        "num_differing": num_differing(arm, own),
    }
    if task.has_invalid:
        summary["num_invalid"] = num_invalid(arm)
    if ways_of(arm):
        summary |= {"rates": success_rates(arm), "groups": group_rates(arm, by), "samples": samples}
        groups = {name: asdict(found) for name, found in group_differences(arm, own, by).items()}
        summary |= {"minus_own": asdict(difference(arm, own)), "groups_minus_own": groups}
    return summary


def tables_of(answers: dict[str, list[Answer]], task: Task, by: str | None = None) -> list[Table]:
    """All that is printed: the arms by group, then pass@k and the majority, if rows have several answers."""
    return [table for table in (arms_table(answers, task, by), samples_table(answers)) if table]


def warnings_of(answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """What makes the rates say less than they seem to, a line each."""
    outcomes = [first_of(answer) for answer in answers[OWN] if answer.scores]
    if outcomes and all(outcome.status == INVALID for outcome in outcomes):
        return [
            f"all {len(outcomes)} scored answers in the arm {OWN} are invalid: there is nothing to lose, so a "
            "replacement that changes nothing means nothing; see what they say, and whether the limit of "
            "new tokens cuts them off"
        ]
    valid = [outcome for outcome in outcomes if outcome.given]
    rows_differ = len({(outcome.expected, outcome.success) for outcome in valid}) > 1
    if len({outcome.given for outcome in valid}) == 1 and rows_differ:
        return [
            f"all {len(valid)} valid answers in the arm {OWN} are {valid[0].given!r:.80}, but the right ones differ: "
            "the rates are those of a constant answer, and a replacement that changes nothing means nothing"
        ]
    return []


def arms_table(answers: dict[str, list[Answer]], task: Task, by: str | None = None) -> Table:
    """A line per arm: success and its paired difference to `own`; shares of answers: other ones than `own` gives,
    invalid ones, those that never ended, those with a block; the share of latents that were replaced.

    First over all rows, then over each group.
    """
    ways = ways_of(answers[OWN])
    compared = len(answers) > 1
    columns = {
        "\n".join(ways): bool(ways),
        "minus own": bool(ways) and compared,
        "differ": compared,
        "invalid": task.has_invalid,
        "never\nended": True,
        "with a\nblock": True,
        "replaced": True,
    }
    notes = [BRACKETS if ways else "", "+3 -1: rows gained and lost" if ways and compared else ""]
    caption = "; ".join(filter(None, [*notes, chance_level(answers[OWN])]))
    drawn = new_table(task.name, caption, "arm", *(heading for heading, shown in columns.items() if shown))
    show = Figures(each for arm in answers.values() for each in arm)
    for title, parts in sections(list(answers.values()), by):
        drawn.add_section()
        drawn.add_row(title)
        for name, part in zip(answers, parts, strict=True):
            cells = [*_scores(part, parts[0], show), *_shares(part, parts[0])]
            drawn.add_row(name, *(cell for cell, shown in zip(cells, columns.values(), strict=True) if shown))
    return drawn


def chance_level(own: Sequence[Answer]) -> str:
    """What one gets without reading the question, in words; empty if rows have no single right answer."""
    found = most_frequent(own)
    return f"always the most frequent answer: {found[1]:.1%}" if found else ""


def _scores(arm: list[Answer], own: list[Answer], show: "Figures") -> list[str]:
    """The rates, one below the other, and the difference."""
    if not ways_of(arm):
        return ["-", "-"]
    rates = "\n".join(map(show.rate, success_rates(arm).values()))
    if arm is own:
        return [rates, ""]
    found = difference(arm, own)
    return [rates, f"{show.difference(found)}, +{found.gained} -{found.lost}"]


def _shares(arm: list[Answer], own: list[Answer]) -> list[str]:
    """Of answers, but for the last, which is of latents."""
    return [
        "" if arm is own else share(num_differing(arm, own), len(arm)),
        share(num_invalid(arm), sum(bool(answer.scores) for answer in arm)),
        share(num_cut_off(arm), len(arm)),
        share(sum(answer.num_blocks > 0 for answer in arm), len(arm)),
        share(sum(answer.num_replaced for answer in arm), sum(answer.num_latents for answer in arm)),
    ]


def share(part: int, total: int) -> str:
    """A part of a total in percent; a dash where there is nothing in all."""
    return f"{part / total:.1%}" if total else "-"


def samples_table(answers: dict[str, list[Answer]]) -> Table | None:
    """A line per arm: pass@k and the majority; None if each row has one answer."""
    rates = sample_rates(answers)
    columns = max(map(list, rates.values()), key=len)
    if not columns:
        return None
    drawn = new_table("several answers to each row", BRACKETS, "arm", *columns)
    show = Figures(each for arm in answers.values() for each in arm)
    for name, by_column in rates.items():
        drawn.add_row(name, *(show.rate(by_column[column]) if column in by_column else "-" for column in columns))
    return drawn


def new_table(title: str, caption: str, first: str, *others: str) -> Table:
    """An empty table whose first column is text and whose others are figures; the caption stands below it."""
    drawn = Table(title=title, caption=caption or None)
    drawn.add_column(first)
    for heading in others:
        drawn.add_column(heading, justify="right")
    return drawn


def sections(arms: Sequence[list[Answer]], by: str | None) -> Iterator[tuple[str, list[list[Answer]]]]:
    """What a table shows of answers to the same rows: all, then each group, if there are some; each with its title."""
    yield _title("all rows", arms[0]), list(arms)
    parts = [grouped(arm, by) for arm in arms]
    if len(parts[0]) > 1:
        for group in parts[0]:
            yield _title(f"{by or 'level'} {group}", parts[0][group]), [part[group] for part in parts]


def _title(name: str, answers: list[Answer]) -> str:
    """With how many rows there are, in bold; on two lines, as the column is that of the short names of arms."""
    rows = {answer.number for answer in answers}
    unscored = len({answer.number for answer in answers if answer.unscored})
    return f"[bold]{escape(name)}: {len(rows)}" + (f"\n{unscored} not scored" if unscored else "") + "[/bold]"


class Figures:
    """Scores as text: percent, unless the task gives others than 0 to 1."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        scores = [outcome.success for answer in answers for outcome in answer.scores.values()]
        self._percent = all(0 <= score <= 1 for score in scores)

    def rate(self, rate: Rate) -> str:
        """A rate with its interval."""
        value, low, high = (self._number(rate[name]) for name in ("rate", "low", "high"))
        return f"{value}{'%' if self._percent else ''} [{low}, {high}]"

    def difference(self, found: Difference) -> str:
        """A difference with its interval, in points."""
        value, low, high = (self._number(part, "+") for part in (found.value, found.low, found.high))
        return f"{value} [{low}, {high}]"

    def _number(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if self._percent else f"{value:{sign}.4g}"
