"""The rows of a file that are asked."""

from pathlib import Path

from mirage_ds.data.rows import read_questions
from mirage_ds.evaluation.answers import Row


def read_questions_of(data: Path) -> list[Row]:
    """The rows of a JSONL file, in order.

    Raises:
        DataError: a row has no question, or an image that cannot be read.
    """
    return [Row(number, where, sample) for number, (where, sample) in enumerate(read_questions(data))]
