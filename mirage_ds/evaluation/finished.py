"""Reads finished results files, and the summaries beside them."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

from mirage_ds import strict_json
from mirage_ds.errors import MALFORMED, DataError, reason_of
from mirage_ds.evaluation.answers import Answer, answer_of

REMEDY = "copy it again, or evaluate again"


def read_finished(path: Path) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """The answers of a results file, as `read_results`, and its summary, which must count as many.

    Raises:
        DataError: one of them cannot be read, or answers are missing.
    """
    arms, summary = read_results(path), read_summary(path)  # the file that was named first, if both are missing
    counted, found = sum(arm["num_answers"] for arm in summary["arms"].values()), sum(map(len, arms.values()))
    if found != counted:
        raise DataError(
            f"the results file is incomplete: its summary counts {counted} answers, the file has {found} ({path}); "
            f"expected both as `mirage evaluate` wrote them; {REMEDY}"
        )
    return arms, summary


def read_results(path: Path) -> dict[str, list[Answer]]:
    """The answers of a results file, by arm, in the order of the file.

    Raises:
        DataError: the file cannot be read, is cut off, or a line of it is no answer.
    """
    arms: dict[str, list[Answer]] = {}
    for where, record in _read_lines(path):
        answer = _answer(record, where)
        arms.setdefault(answer.arm, []).append(answer)
    return arms


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file:line, object), at least one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"the results file cannot be read: {reason_of(error)} ({path}); expected a file that `mirage evaluate` "
            "wrote; name such a file"
        ) from error
    for number, line in enumerate(lines or [b""], 1):
        try:
            record = strict_json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it is a {type(record).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the results file is incomplete or damaged: {reason_of(error)} ({path}:{number}); expected one JSON "
                f"object in each line, as `mirage evaluate` wrote them; {REMEDY}"
            ) from error
        yield f"{path}:{number}", record


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a results file: FILE.summary.json.

    Raises:
        DataError: it cannot be read, or is none.
    """
    summary = Path(f"{path}.summary.json")
    try:
        found = strict_json.loads(summary.read_bytes())
        if not isinstance(found["task"], str) or not isinstance(found["settings"]["rows"], str):
            raise ValueError("its task or settings.rows is no text")
        if not all(isinstance(arm["num_answers"], int) for arm in found["arms"].values()):
            raise ValueError("a number of answers is none")
    except MALFORMED as error:
        raise DataError(
            f"the summary cannot be used: {reason_of(error)} ({summary}); expected the file that `mirage evaluate` "
            "wrote beside its results; copy it there, or evaluate again"
        ) from error
    return found


def _answer(record: dict[str, Any], where: str) -> Answer:
    kinds = {field.name: get_origin(field.type) or field.type for field in fields(Answer)}
    wrong = [name for name, value in record.items() if type(value) is not kinds.get(name)]
    try:
        answer = answer_of(record)
    except (TypeError, AttributeError) as error:
        wrong = [*wrong, str(error)]
    if wrong or not all(isinstance(outcome.success, int | float) for outcome in answer.scores.values()):
        raise DataError(
            f"the line is no answer: {', '.join(wrong) or 'scores':.80} ({where}); expected a line of a results file "
            "as `mirage evaluate` wrote it; name such a file, or evaluate again"
        )
    return answer
