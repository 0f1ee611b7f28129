"""What is asked: the rows of a file that are scored as a task, or the question of a command line. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mirage_ds.config import TaskName
from mirage_ds.data.images import IMAGE_FORMATS, open_image
from mirage_ds.data.rows import Sample, check_question, read_questions
from mirage_ds.errors import DataError
from mirage_ds.inference.results import Scores
from mirage_ds.inference.tasks import choice, vsp


def score_planning(sample: Sample, answer: str) -> Scores:
    """The moves in the last box, walked on the row's `map_desc`: strictly parsed, and as the reference parses them."""
    return {mode: vsp.score(sample.extra.get("map_desc"), answer, mode) for mode in ("strict", "reference")}


def score_reasoning(sample: Sample, answer: str) -> Scores:
    """The letter in the last box against the letter in the row's `text_output`."""
    return {"exact": choice.score(sample.text_output, answer)}


TASKS: dict[TaskName, Callable[[Sample, str], Scores]] = {
    "vsp-spatial-planning": score_planning,
    "vsp-spatial-reasoning": score_reasoning,
}


def read_task(data: Path, task: TaskName) -> list[tuple[str, Sample]]:
    """The rows of a file, each with its file:line, after a check that every one can be asked and scored.

    Raises:
        DataError: a row has no question, an image that cannot be read, or no field that the task scores by.
    """
    rows = list(read_questions(data))
    for where, sample in rows:
        try:
            TASKS[task](sample, "")
        except DataError as error:
            raise DataError(f"{where} is not a row of {task}: {error}") from error
    return rows


def read_question(prompt: str, images: Sequence[Path]) -> Sample:
    """The question of a command line.

    Raises:
        DataError: it is empty, an image cannot be read, or its <image> slots do not match the images.
    """
    if not prompt:
        raise DataError("the question is empty (--prompt); expected any text; enter a question")
    question = Sample(key="prompt", text_input=prompt, text_output="", input_images=tuple(map(_read, images)))
    check_question(question, "--prompt")
    return question


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the image cannot be read: {error.strerror} (--image {path}); expected a file in one of the formats "
            f"{', '.join(IMAGE_FORMATS)}; fix the path"
        ) from error
    open_image(data, f"--image {path}")
    return data
