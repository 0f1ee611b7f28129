"""Reads rows of JSONL files as samples: a question with images, an answer with helper images. Needs no torch.

{"text_input": str, "text_output": str, "image_input": image or list, "image_output": image or list,
 "latent_size": int or list, ...}; what an image may be is in row_images.py
"""

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_ds import strict_json, tokens
from mirage_ds.data.images import open_image
from mirage_ds.data.row_images import read_images
from mirage_ds.errors import DataError

IMAGE_TAG = "<image>"
OUTPUT_IMAGE_TAG = "<output_image>"

# In a user's text, one of these would start a turn, an image or a latent block that does not exist.
RESERVED_TOKENS = (
    tokens.IM_START,
    tokens.IM_END,
    tokens.END_OF_TEXT,
    tokens.VISION_START,
    tokens.VISION_END,
    tokens.IMAGE_PAD,
    tokens.VIDEO_PAD,
    *tokens.LATENT_TOKENS,
)
_ROW_FIELDS = ("text_input", "text_output", "image_input", "image_output", "latent_size")


@dataclass(frozen=True)
class Sample:
    """A question with its images, an answer with its helper images. Images are the bytes of the user's files."""

    key: str
    text_input: str
    text_output: str
    input_images: tuple[bytes, ...] = ()
    helper_images: tuple[bytes, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)  # the row's other fields, including the user's id
    latent_sizes: tuple[int, ...] = ()  # K of each latent block; empty: all have the configured one
    helper_name: str = ""  # of helper images that are not the row's own, for messages
    target_slots: range = range(0)  # of the helper images in the run's target cache, if it has one
    cached_targets: bytes | None = None  # what the cache has there, if it is complete
    set_number: int = 0  # of the run's folders of shards, the one that it is from


def read_rows(path: Path) -> Iterator[tuple[str, Sample]]:
    """Yields (file:line, sample) of a JSONL file; keys number the rows. Empty lines are skipped.

    Raises:
        DataError: the file cannot be read or has no row, or `read_row` refuses a row.
    """
    for number, (where, row) in enumerate(read_json_lines(path)):
        yield where, read_row(row, key=f"{number:09d}", where=where, folder=path.parent)


def count_rows(path: Path) -> int:
    """Counts the rows of a JSONL file, usable or not; at least one.

    Raises:
        DataError: the file cannot be read or has no row.
    """
    return sum(1 for _ in read_lines(path))


def read_questions(path: Path, *, helpers: bool = False) -> Iterator[tuple[str, Sample]]:
    """As `read_rows`, for questions that will be answered by decoding; see `read_question`."""
    for number, (where, row) in enumerate(read_json_lines(path)):
        yield where, read_question(row, key=f"{number:09d}", where=where, folder=path.parent, helpers=helpers)


def read_question(row: dict[str, Any], *, key: str, where: str, folder: Path, helpers: bool = False) -> Sample:
    """As `read_row`, but text_output may be missing, and helper images are only read on request.

    Args:
        helpers: read the helper images, if the row has some, and K of their blocks.

    Raises:
        DataError: the question and its images do not match, or an image cannot be read.
    """
    answer = read_text(row, "text_output", where) if row.get("text_output") else ""
    helper_images = read_images(row.get("image_output"), "image_output", where, folder) if helpers else ()
    num_blocks = num_latent_blocks(answer, len(helper_images))
    sample = Sample(
        key=key,
        text_input=read_text(row, "text_input", where),
        text_output=answer,
        input_images=read_images(row.get("image_input"), "image_input", where, folder),
        helper_images=helper_images,
        latent_sizes=read_latent_sizes(row, num_blocks, where) if helper_images else (),
        extra=_extra(row),
    )
    check = check_sample if helper_images else check_question
    check(sample, where)
    return sample


def decode_images(sample: Sample, where: str) -> None:
    """Decodes all images of a sample once, so that nothing can fail later.

    Raises:
        DataError: one cannot be decoded; the message names `where`.
    """
    for name, images in (("image", sample.input_images), ("helper image", sample.helper_images)):
        for number, data in enumerate(images):
            open_image(data, f"{where}, {name} {number}")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file:line, object) of a JSONL file, at least one.

    Raises:
        DataError: the file cannot be read, has no line, or a line is not a JSON object in UTF-8.
    """
    for number, _, line in read_lines(path):
        where = f"{path}:{number}"
        yield where, parse_row(line, where)


def read_lines(path: Path, offset: int = 0, number: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yields (line number from 1, bytes of the file up to its end, line) of each line that is not empty.

    Args:
        offset, number: bytes and lines to leave out.

    Raises:
        DataError: the file cannot be read or has no such line.
    """
    empty = offset == 0
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for marked in file:
                number, offset = number + 1, offset + len(marked)
                line = marked.removeprefix(codecs.BOM_UTF8)  # Notepad, PowerShell and Excel write it
                if line.strip():
                    empty = False
                    yield number, offset, line
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror} ({path}); name an existing JSONL file") from error
    if empty:
        raise DataError(
            f"no rows ({path}); the file needs at least one JSON object, one per line; write some rows to it"
        )


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = strict_json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"malformed JSON: {error} ({where}); every line must be one JSON object in UTF-8; fix the line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"the row is a {type(row).__name__} ({where}); every line must be one JSON object; fix the line"
        )
    return row


def read_row(row: dict[str, Any], *, key: str, where: str, folder: Path) -> Sample:
    """Reads a row's images from `folder` and checks that texts and images match.

    Raises:
        DataError: a field of the wrong type, a missing image file, or what `check_sample` refuses.
    """
    answer, helpers = (
        read_text(row, "text_output", where),
        read_images(row.get("image_output"), "image_output", where, folder),
    )
    sample = Sample(
        key=key,
        text_input=read_text(row, "text_input", where),
        text_output=answer,
        input_images=read_images(row.get("image_input"), "image_input", where, folder),
        helper_images=helpers,
        latent_sizes=read_latent_sizes(row, num_latent_blocks(answer, len(helpers)), where),
        extra=_extra(row),
    )
    check_sample(sample, where)
    return sample


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _ROW_FIELDS}


def read_text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise DataError(f"no field {name} ({where}), fields: {fields:.200}; expected a non-empty text; add the field")
    value = row[name]
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} is {value!r:.80} ({where}); expected a non-empty text; fill it in")
    return value


def read_latent_sizes(row: Mapping[str, Any], num_blocks: int, where: str) -> tuple[int, ...]:
    """K of each of the answer's latent blocks by the row's latent_size; empty if it has none.

    Raises:
        DataError: it is neither a positive integer nor a list of them, one for each block.
    """
    value = row.get("latent_size")
    if value is None:
        return ()
    sizes = value if isinstance(value, list) else [value] * max(num_blocks, 1)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise DataError(
            f"latent_size is {value!r:.80} ({where}); expected a positive integer, or a list of them, one for each "
            "latent block; fix the field, or remove it to use model.latent_size"
        )
    if isinstance(value, list) and len(sizes) != num_blocks:
        raise DataError(
            f"numbers in latent_size: {len(sizes)}, latent blocks in the answer: {num_blocks} ({where}); expected one "
            "number for each block, or a single integer for all; add or remove numbers"
        )
    return tuple(sizes[:num_blocks])


def check_sample(sample: Sample, where: str) -> None:
    """Refuses texts that would break the labels, and slots that do not match the images.

    Raises:
        DataError: the sample is refused; the message names `where`.
    """
    check_question(sample, where)
    _check_text(sample.text_output, "text_output", where)
    if IMAGE_TAG in sample.text_output:  # LLaMA-Factory's way to write an output image; it would be trained as text
        raise DataError(
            f"text_output contains {IMAGE_TAG} ({where}); allowed: {OUTPUT_IMAGE_TAG}, where a helper image "
            f"belongs; write {OUTPUT_IMAGE_TAG} there, or remove it"
        )
    num_slots, num_helpers = sample.text_output.count(OUTPUT_IMAGE_TAG), len(sample.helper_images)
    if num_slots != num_helpers and (num_slots, num_helpers) != (0, 1):
        raise DataError(
            f"{OUTPUT_IMAGE_TAG} slots in text_output: {num_slots}, helper images: {num_helpers} ({where}); allowed: "
            "one slot per image, or none for one image, whose latents then come first; add or remove slots or images"
        )


def check_question(sample: Sample, where: str) -> None:
    """The checks of `check_sample` on the question, the only part of a sample that decoding uses.

    Raises:
        DataError: the sample is refused; the message names `where`.
    """
    _check_text(sample.text_input, "text_input", where)
    num_blocks = num_image_blocks(sample.text_input, len(sample.input_images))
    if num_blocks != len(sample.input_images):
        raise DataError(
            f"image slots in text_input: {num_blocks}, input images: {len(sample.input_images)} ({where}); allowed: "
            f"one {IMAGE_TAG} per image, or none, which puts all images in front; add or remove slots or images"
        )


def num_image_blocks(question: str, num_images: int) -> int:
    """Number of image blocks of a question: its <image> slots, or one per image, in front, if it has none.

    As in the reference, an <output_image> in a question also becomes an image block.
    """
    return (question.count(IMAGE_TAG) or num_images) + question.count(OUTPUT_IMAGE_TAG)


def num_latent_blocks(answer: str, num_helpers: int) -> int:
    """Number of latent blocks of an answer: its <output_image> slots, or one in front for a helper image."""
    return answer.count(OUTPUT_IMAGE_TAG) or min(num_helpers, 1)


def _check_text(text: str, name: str, where: str) -> None:
    reserved = [token for token in RESERVED_TOKENS if token in text]
    if reserved:
        raise DataError(
            f"{name} contains {', '.join(reserved)} ({where}); only the chat template may write special tokens; "
            f"remove them, and mark images by {IMAGE_TAG} and {OUTPUT_IMAGE_TAG}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} contains half of a surrogate pair at character {error.start} ({where}); a text must be valid "
            "Unicode; write the complete character"
        ) from error
