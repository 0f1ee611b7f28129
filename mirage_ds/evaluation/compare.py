"""Compares finished results files: success, paired differences to the first file, rows that changed.

Files without scores (task `none`) are compared by the texts of their answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.finished import read_finished
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.rates import (
    differ,
    difference,
    num_cut_off,
    num_differing,
    paired,
    rate_of,
    row_scores,
    ways_of,
)
from mirage_ds.evaluation.scoring import NO_TASK
from mirage_ds.evaluation.tables import BRACKETS, Figures, new_table, sections, share
from mirage_ds.inference.options import Decoding

SHORT = 60  # characters of an answer in a table
# The settings, beside the model, that decide what is answered; `computed` has the dtype that was computed in.
DECODING = ("samples", *(field.name for field in fields(Decoding) if field.name not in ("model", "dtype")), "computed")


@dataclass(frozen=True)
class Side:
    """One arm of a results file."""

    name: str
    task: str
    settings: dict[str, Any]  # of the summary; `rows` and `task_file` are digests
    answers: list[Answer]


def read_sides(files: Sequence[Path], arm: str) -> list[Side]:
    """The answers of every file in one arm.

    Raises:
        DataError: a file cannot be read, lacks the arm or scores, or its rows or its task differ from the first one's.
    """
    sides = [_read_side(file, arm) for file in files]
    first = sides[0]
    for side in sides:
        if Path(side.task).name != Path(first.task).name:  # my_file.py:score may have been elsewhere
            raise DataError(
                f"the tasks differ: {side.task} ({side.name}) and {first.task} ({first.name}); expected results of one "
                "task; name other files, or evaluate again"
            )
        if side.settings.get("task_file") != first.settings.get("task_file"):
            raise DataError(
                f"another version of {Path(side.task).name.rpartition(':')[0]} scored {side.name} than {first.name} "
                "(task_file in their summaries); expected scores of one function; evaluate again"
            )
        if problem := _difference_of_rows(first, side):
            raise DataError(
                f"the rows differ: {problem} ({side.name}); differences are over the same rows; name files of the same "
                "data and --limit"
            )
    return sides


def _read_side(file: Path, arm: str) -> Side:
    arms, summary = read_finished(file)
    if arm not in arms:
        raise DataError(
            f"the file has no arm {arm!r:.80} ({file}, --arm); it has {', '.join(arms):.200}; name one of them"
        )
    if not ways_of(arms[arm]) and summary["task"] != NO_TASK:
        raise DataError(
            f"no answer is scored ({file}, task {summary['task']}); expected scores, or the task {NO_TASK}; evaluate "
            "again"
        )
    return Side(str(file), summary["task"], summary["settings"], arms[arm])


def _difference_of_rows(first: Side, side: Side) -> str:
    """What differs between the rows of two files; empty if nothing does."""
    ours, theirs = ({answer.number: answer.row for answer in each.answers} for each in (side, first))
    if set(ours) != set(theirs):
        return f"{len(ours)} rows, and {len(theirs)} in {first.name}"
    for number, row in ours.items():
        for name in {**row, **theirs[number]}:
            if row.get(name) != theirs[number].get(name):
                return f"the field {name!r:.80} of row {number} is not the same as in {first.name}"
    same = side.settings["rows"] == first.settings["rows"]
    return "" if same else f"a question, an image or a right answer is not that of {first.name}"


def other_decoding(sides: Sequence[Side]) -> list[str]:
    """A line for each file whose answers were decoded otherwise than the first one's: the settings that differ."""
    first = sides[0]
    lines = []
    for side in sides[1:]:
        ours, theirs = ({name: each.settings.get(name) for name in DECODING} for each in (side, first))
        unused = _unused(side) & _unused(first)
        differ = [
            f"{name} {ours[name]}, not {theirs[name]}"
            for name in DECODING
            if ours[name] != theirs[name] and name not in unused
        ]
        lines += [f"{side.name} was decoded otherwise than {first.name}: {'; '.join(differ)}"] if differ else []
    return lines


def _unused(side: Side) -> set[str]:
    """The settings that decide nothing in greedy decoding; other arms than `own` draw what they feed by the seed."""
    if side.settings.get("temperature") != 0:
        return set()
    return {"top_p", "seed"} if side.answers[0].arm == OWN else {"top_p"}


def comparison_table(sides: Sequence[Side], by: str | None) -> Table:
    """A line per file: success, difference to the first, rows gained and lost, if answers are scored; shares of answers
    that differ from the first file's and that never ended. Over all rows, then over each group.
    """
    ways = ways_of(sides[0].answers)[:1]
    figures = [*ways, "minus the first", "gained", "lost"] if ways else []
    drawn = new_table("comparison", BRACKETS if ways else "", "file", *figures, "differ", "never ended")
    show = Figures(answer for side in sides for answer in side.answers)
    for title, parts in sections([side.answers for side in sides], by):
        drawn.add_section()
        drawn.add_row(title)
        for side, part in zip(sides, parts, strict=True):
            cells = [cell for way in ways for cell in _figures(part, parts[0], way, show)]
            differing = "" if part is parts[0] else share(num_differing(part, parts[0]), len(paired(part, parts[0])))
            drawn.add_row(escape(side.name), *cells, differing, f"{num_cut_off(part)}")
    return drawn


def _figures(answers: list[Answer], first: list[Answer], way: str, show: Figures) -> list[str]:
    scores = row_scores(answers, way).values()
    if not scores:
        return ["-", "-", "-", "-"]
    found = difference(answers, first)
    changes = ["", "", ""] if answers is first else [show.difference(found), f"{found.gained}", f"{found.lost}"]
    return [show.rate(rate_of(scores)), *changes]


def changed_table(sides: Sequence[Side], number: int) -> Table | None:
    """Up to `number` rows whose score in another file differs from that in the first, and the answers; None: no row.

    If answers are not scored, rows with another text.
    """
    scored = bool(ways_of(sides[0].answers))
    find, what = (_changed, "the ends of their first answers with another score")
    if not scored:
        find, what = _differing, "their first answers that differ, long ones from there"
    rows = [row for side in sides[1:] for row in find(sides[0], side)][:number]
    if not rows:
        return None
    drawn = Table(title=f"rows that changed: {what}", show_lines=True)
    for heading in ("row", "file", "change", f"answer in {sides[0].name}", "answer in the file"):
        drawn.add_column(escape(heading))
    for row in rows:
        drawn.add_row(*map(escape, row))
    return drawn


def _changed(first: Side, side: Side) -> Iterator[tuple[str, ...]]:
    way = ways_of(first.answers)[0]
    before, after = row_scores(first.answers, way), row_scores(side.answers, way)
    ours, theirs = _scored_by_row(side.answers), _scored_by_row(first.answers)
    for number, score in after.items():
        if number in before and score != before[number]:
            old, new = _first_change(theirs[number], ours[number], way)
            change = f"{'gained' if score > before[number] else 'lost'}, {before[number]:.3g} to {score:.3g}"
            yield _line(side, change, old, _end(old.text), _end(new.text))


def _differing(first: Side, side: Side) -> Iterator[tuple[str, ...]]:
    seen = set()
    for new, old in sorted(paired(side.answers, first.answers), key=lambda pair: (pair[0].number, pair[0].sample)):
        if new.number not in seen and differ(new, old):
            seen.add(new.number)
            texts = _one_line(old.text), _one_line(new.text)
            change = "another text" if texts[0] != texts[1] else "other white space"
            yield _line(side, change, old, *_from_difference(*texts))


def _line(side: Side, change: str, old: Answer, was: str, becomes: str) -> tuple[str, ...]:
    return Path(old.where).name, side.name, change, was, becomes


def _scored_by_row(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    """The scored answers to each row, in the order of their samples."""
    by_row: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.sample):
        if answer.scores:
            by_row.setdefault(answer.number, []).append(answer)
    return by_row


def _first_change(before: list[Answer], after: list[Answer], way: str) -> tuple[Answer, Answer]:
    """The first two answers with different scores: of one sample, else, if numbers of samples differ, of any two."""
    pairs = (*zip(before, after, strict=False), *product(before, after))
    return next((old, new) for old, new in pairs if old.scores[way].success != new.scores[way].success)


def _one_line(text: str) -> str:
    """Without control characters."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def _end(text: str) -> str:
    """The end of an answer, where it says what it comes to."""
    line = _one_line(text)
    return line if len(line) <= SHORT else f"...{line[3 - SHORT :]}"


def _from_difference(one: str, other: str) -> tuple[str, str]:
    """Two lines; if one is too long for a table, from the first place where they differ, and cut at their ends."""
    if max(len(one), len(other)) <= SHORT:
        return one, other
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return _beginning(one, same), _beginning(other, same)


def _beginning(line: str, start: int) -> str:
    rest = f"...{line[start:]}" if start else line
    return rest if len(rest) <= SHORT else f"{rest[: SHORT - 3]}..."
