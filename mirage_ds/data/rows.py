"""Reads rows of JSONL files as samples: a question with images, an answer with helper images. Needs no torch.

{"text_input": str, "text_output": str, "image_input": image or list, "image_output": image or list,
 "latent_size": int or list, ...}; what an image may be is in row_images.py. Instead of the two texts a row may have
several turns, see turns.py
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.data.images import open_image
from mirage_ds.data.row_images import read_images
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG, check_answer_text, check_text
from mirage_ds.data.turns import CONVERSATION_FIELDS, Turn, has_turns, read_turns
from mirage_ds.errors import DataError

_ROW_FIELDS = ("text_input", "text_output", "image_input", "image_output", "latent_size")


@dataclass(frozen=True)
class Sample:
    """A question with its images, an answer with its helper images. Images are the bytes of the user's files.

    Of several turns it is the last question and answer, after a context; images are those of all turns."""

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
    context: tuple[Turn, ...] = ()  # what was said before the question: system turn, earlier questions and answers

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns: the context, the question, its answer."""
        return (*self.context, Turn("human", self.text_input), Turn("gpt", self.text_output, train=True))


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
    sample = read_texts(row, key=key, where=where, answered=False)
    helper_images = read_images(row.get("image_output"), "image_output", where, folder) if helpers else ()
    sample = replace(
        sample,
        input_images=read_images(row.get("image_input"), "image_input", where, folder),
        helper_images=helper_images,
    )
    check_prompt(sample, where)
    if not helper_images:
        return sample
    check_sample(sample, where)
    return replace(sample, latent_sizes=read_latent_sizes(row, num_latent_blocks(sample), where))


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
    sample = replace(
        read_texts(row, key=key, where=where),
        input_images=read_images(row.get("image_input"), "image_input", where, folder),
        helper_images=read_images(row.get("image_output"), "image_output", where, folder),
    )
    check_sample(sample, where)
    return replace(sample, latent_sizes=read_latent_sizes(row, num_latent_blocks(sample), where))


def read_texts(row: Mapping[str, Any], *, key: str, where: str, answered: bool = True) -> Sample:
    """A sample with the texts of a row, and with those fields that are its own affair; without images.

    Args:
        answered: the row must have an answer to its last question.

    Raises:
        DataError: a text is missing or has another type, or `read_turns` refuses the turns.
    """
    extra = {name: value for name, value in row.items() if name not in _ROW_FIELDS}
    if has_turns(row):
        *context, question, answer = read_turns(row, where, answered=answered)
        extra = {name: value for name, value in extra.items() if name not in CONVERSATION_FIELDS}
        return Sample(key, question.text, answer.text, context=tuple(context), extra=extra)
    has_answer = answered or row.get("text_output")
    text_output = read_text(row, "text_output", where) if has_answer else ""
    return Sample(key, read_text(row, "text_input", where), text_output, extra=extra)


def read_text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise DataError(f"no field {name} ({where}), fields: {fields:.200}; expected a non-empty text; add the field")
    value = row[name]
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} is {value!r:.80} ({where}); expected a non-empty text; fill it in")
    return value


def read_latent_sizes(row: Mapping[str, Any], num_blocks: int, where: str) -> tuple[int, ...]:
    """K of each of the row's latent blocks by its latent_size; empty if it has none.

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
            f"numbers in latent_size: {len(sizes)}, latent blocks of the row: {num_blocks} ({where}); expected one "
            "number for each block, or a single integer for all; add or remove numbers"
        )
    return tuple(sizes[:num_blocks])


def check_sample(sample: Sample, where: str) -> None:
    """Refuses texts that would break the labels, and slots that do not match the images.

    Raises:
        DataError: the sample is refused; the message names `where`.
    """
    check_question(sample, where)
    name = _names(sample)[-1]
    check_text(sample.text_output, name, where)
    check_answer_text(sample.text_output, name, where)
    num_slots, num_helpers = _count(OUTPUT_IMAGE_TAG, sample.turns, trained=True), len(sample.helper_images)
    if num_slots != num_helpers and (num_slots, num_helpers) != (0, 1):
        place = "trained answers" if sample.context else name
        raise DataError(
            f"{OUTPUT_IMAGE_TAG} slots in {place}: {num_slots}, helper images: {num_helpers} ({where}); allowed: one "
            "slot per image, or none for one image, whose latents then come first in the last answer; add or remove "
            "slots or images"
        )


def check_question(sample: Sample, where: str) -> None:
    """The checks of `check_sample` on all that comes before the last answer.

    Raises:
        DataError: the sample is refused; the message names `where`.
    """
    for name, turn in zip(_names(sample)[:-1], sample.turns, strict=False):
        check_text(turn.text, name, where)
        if turn.role == "system" and IMAGE_TAG in turn.text:
            raise DataError(
                f"{name} contains {IMAGE_TAG} ({where}), but is from system; allowed: in turns from human and in "
                "answers that are not trained; put the image there"
            )
        if turn.train:
            check_answer_text(turn.text, name, where)
        elif sample.context and OUTPUT_IMAGE_TAG in turn.text:
            raise DataError(
                f"{name} contains {OUTPUT_IMAGE_TAG} ({where}), but is no trained answer; allowed: in answers that "
                f"train_answers has; remove it, write {IMAGE_TAG} for an image that is seen, or train the answer"
            )
    num_blocks = num_image_blocks(sample)
    if num_blocks != len(sample.input_images):
        place = "conversations" if sample.context else "text_input"
        raise DataError(
            f"image slots in {place}: {num_blocks}, input images: {len(sample.input_images)} ({where}); allowed: "
            f"one {IMAGE_TAG} per image, or none, which puts all images in front; add or remove slots or images"
        )


def check_prompt(sample: Sample, where: str) -> None:
    """The checks of what decoding uses of a sample: all that comes before its last answer.

    Raises:
        DataError: `check_question` refuses it, or an earlier answer has latents; the message names `where`.
    """
    check_question(sample, where)
    if sample.context and _count(OUTPUT_IMAGE_TAG, sample.context):
        raise DataError(
            f"an earlier answer has {OUTPUT_IMAGE_TAG} ({where}); decoding takes earlier answers as text, and makes "
            "latents in its own answer only; ask rows whose earlier answers have none, or remove it there"
        )


def num_image_blocks(sample: Sample) -> int:
    """Number of image blocks: the <image> slots, or one per image, before the first question, if there is none.

    As in the reference, an <output_image> in the question of a row of one turn also becomes an image block.
    """
    asked = sample.turns[:-1]
    others = 0 if sample.context else _count(OUTPUT_IMAGE_TAG, asked)
    return (_count(IMAGE_TAG, asked) or len(sample.input_images)) + others


def num_early_image_blocks(sample: Sample) -> int:
    """Number of image blocks before the first latent block; all of them in a row without latents, or of one turn."""
    for number, turn in enumerate(sample.context):
        if turn.train and OUTPUT_IMAGE_TAG in turn.text and _count(IMAGE_TAG, sample.turns):
            return _count(IMAGE_TAG, sample.context[:number])
    return num_image_blocks(sample)


def num_latent_blocks(sample: Sample) -> int:
    """Number of latent blocks: the trained <output_image> slots, or one in the last answer for a helper image."""
    return _count(OUTPUT_IMAGE_TAG, sample.turns, trained=True) or min(len(sample.helper_images), 1)


def _count(tag: str, turns: Iterable[Turn], *, trained: bool = False) -> int:
    """Args: trained: in trained answers only."""
    return sum(turn.text.count(tag) for turn in turns if turn.train or not trained)


def _names(sample: Sample) -> list[str]:
    """Of each turn, where the row has it."""
    if not sample.context:
        return ["text_input", "text_output"]
    return [f"conversations[{number}]" for number in range(len(sample.turns))]
