"""Reads finished results files, and the summaries beside them."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

from mirage_ds import strict_json
from mirage_ds.data.rows import read_json_lines
from mirage_ds.errors import MALFORMED, DataError, reason_of
from mirage_ds.evaluation.answers import Answer, answer_of


def read_results(path: Path) -> dict[str, list[Answer]]:
    """The answers of a results file, by arm, in the order of the file.

    Raises:
        DataError: the file cannot be read, or a line of it is no answer.
    """
    arms: dict[str, list[Answer]] = {}
    for where, record in read_json_lines(path):
        answer = _answer(record, where)
        arms.setdefault(answer.arm, []).append(answer)
    return arms


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
