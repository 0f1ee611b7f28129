"""The rows of a file that are asked."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from mirage_ds.data.rows import decode_images, read_questions
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import Arm, check_arms


def read_questions_of(
    data: Path,
    arms: Sequence[Arm] = (),
    limit: int | None = None,
    *,
    helpers: bool = False,
    check_images: bool = True,
) -> list[Row]:
    """The rows of a JSONL file, in order, with what the arms need of them.

    Args:
        limit: reads the first ones only; None: all.
        helpers: read the helper images even if no arm needs them.
        check_images: decode all images once.

    Raises:
        DataError: a row has no question, or an image that cannot be read; or the rows have too little for an arm.
    """
    helpers = helpers or any(arm.latents == "oracle" for arm in arms)
    rows = []
    for number, (where, sample) in enumerate(islice(read_questions(data, helpers=helpers), limit)):
        if check_images:
            decode_images(sample, where)
        rows.append(Row(number, where, sample))
    check_arms(arms, rows, str(data))
    return rows
