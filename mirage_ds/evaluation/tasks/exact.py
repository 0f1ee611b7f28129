"""Scores an answer by comparing it with the row's own: the same text or the same number, by `given.canonical`."""

from collections.abc import Mapping
from typing import Any

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.given import canonical, extract_given
from mirage_ds.evaluation.tasks.outcome import INVALID, Outcome


def score(row: Mapping[str, Any], answer: str) -> Outcome:
    """ "Right", "Wrong" or "Invalid", the latter for an answer that gives nothing.

    Args:
        row: its fields; the right answer is `answer`, a text or a number, or else what `text_output` gives.

    Raises:
        DataError: the row has no right answer.
    """
    expected = canonical(expected_text(row))
    if not expected:
        raise DataError(
            "the row has no right answer (in a row that is to be scored); expected a text or a number in the field "
            "answer, or an answer in text_output; add one of them"
        )
    given = canonical(extract_given(answer))
    status = INVALID if not given else "Right" if given == expected else "Wrong"
    return Outcome(status == "Right", status, given, expected)


def expected_text(row: Mapping[str, Any]) -> str:
    """The right answer of a row: its `answer`, or else what its `text_output` gives; empty if that is nothing.

    Raises:
        DataError: it has neither field, or `answer` is neither a text nor a number.
    """
    value, text_output = row.get("answer"), row.get("text_output") or ""
    if value is None and not text_output:
        raise DataError(
            "no field text_output or answer (in a row that is to be scored); expected a text or a number in the field "
            "answer, or an answer in text_output; add one of them"
        )
    if value is None:
        return extract_given(text_output)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"answer is {value!r:.80} (in a row that is to be scored); expected a text or a number; fix the field"
        )
    return str(value)
