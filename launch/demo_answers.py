"""Reads the answers that `mirage evaluate` wrote for the demo's models."""

from pathlib import Path

from mirage_ds import strict_json
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.tasks.outcome import Outcome


def read_answers(file: Path) -> dict[str, list[Answer]]:
    """The answers of a results file by arm, in the order of the rows."""
    answers: dict[str, list[Answer]] = {}
    for line in file.read_text().splitlines():
        fields = strict_json.loads(line)
        scores = {way: Outcome(**outcome) for way, outcome in fields.pop("scores").items()}
        answers.setdefault(fields["arm"], []).append(Answer(**fields, scores=scores))
    return answers
