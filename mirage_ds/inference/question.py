"""The question of a command line. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from mirage_ds.data.images import IMAGE_FORMATS, open_image
from mirage_ds.data.rows import Sample, check_question
from mirage_ds.errors import DataError


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
