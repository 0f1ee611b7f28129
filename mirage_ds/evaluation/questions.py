"""The rows of a file that are asked."""

from itertools import islice
from pathlib import Path

from mirage_ds.data.rows import read_questions
from mirage_ds.evaluation.answers import Row


def read_questions_of(data: Path, limit: int | None = None) -> list[Row]:
    """The rows of a JSONL file, in order.

    Args:
        limit: reads the first ones only; None: all.

    Raises:
        DataError: a row has no question, or an image that cannot be read.
    """
    questions = islice(read_questions(data), limit)
    return [Row(number, where, sample) for number, (where, sample) in enumerate(questions)]
