"""Turns with texts and images, from which rows of ours are made."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_tools.importing.source_rows import LeftOutError, Picture
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG

SYSTEM, HUMAN, GPT = "system", "human", "gpt"
ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "human": HUMAN,
    "user": HUMAN,
    "gpt": GPT,
    "assistant": GPT,
    "chatgpt": GPT,
}
"""Ours by the names in chat files."""

Part = str | Picture
Row = dict[str, Any]
"""A row of ours, with a list of Pictures in image_input and image_output."""


@dataclass(frozen=True)
class Turn:
    role: str  # SYSTEM, HUMAN or GPT
    parts: tuple[Part, ...]
    train: bool = True  # an answer: whether it may be trained

    def text(self, image_tag: str) -> str:
        return "".join(part if isinstance(part, str) else image_tag for part in self.parts)

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


def one_turn(question: Sequence[Part], answer: Sequence[Part], fields: Mapping[str, Any]) -> Row:
    """A row with one question and its answer."""
    return _to_row([Turn(HUMAN, tuple(question)), Turn(GPT, tuple(answer))], fields)


def question_row(question: Sequence[Part], fields: Mapping[str, Any]) -> Row:
    """A row for evaluation, which has no answer that is trained."""
    turn = Turn(HUMAN, tuple(question))
    return {"text_input": turn.text(IMAGE_TAG), **_images("image_input", turn.pictures), **fields}


def rows_of_turns(turns: Sequence[Turn], fields: Mapping[str, Any], *, all_turns: bool) -> list[Row]:
    """A row whose last answer is trained, of those that may be; its earlier turns are context, later ones left out.

    Args:
        turns: a system turn or none, then questions and answers in turn.
        all_turns: a row for each answer, with the turns before it.

    Raises:
        LeftOutError: the order is another one, or an answer is empty, or none may be trained.
    """
    talk = turns[1:] if turns and turns[0].role == SYSTEM else turns
    roles = [turn.role for turn in talk]
    if not roles or roles[0] != HUMAN or roles[-1] != GPT or any(one == other for one, other in pairwise(roles)):
        raise LeftOutError(
            "the turns are in another order",
            f"{', '.join(turn.role for turn in turns)[:120] or 'there are none'}; expected a system turn or none, then "
            "questions and answers in turn, an answer last",
        )
    if any(not turn.text(IMAGE_TAG).strip() for turn in turns):
        raise LeftOutError("a turn is empty", "expected a text or an image in each turn")
    answers = [number for number, turn in enumerate(turns) if turn.role == GPT and turn.train]
    if not answers:
        raise LeftOutError("no answer to train", "each has the weight 0; expected one without it")
    return [_to_row(turns[: number + 1], fields) for number in (answers if all_turns else answers[-1:])]


def _to_row(turns: Sequence[Turn], fields: Mapping[str, Any]) -> Row:
    """The last turn is the answer that is trained: an image in an earlier answer is one of the context."""
    *context, answer = turns
    inputs = [picture for turn in context for picture in turn.pictures]
    images = {**_images("image_input", inputs), **_images("image_output", answer.pictures)}
    texts = [turn.text(IMAGE_TAG) for turn in context] + [answer.text(OUTPUT_IMAGE_TAG)]
    if len(turns) == 2 and context[0].role == HUMAN:
        return {"text_input": texts[0], "text_output": texts[1], **images, **fields}
    said = [{"from": turn.role, "value": text} for turn, text in zip(turns, texts, strict=True)]
    return {"conversations": said, **images, **fields}


def _images(name: str, pictures: list[Picture]) -> dict[str, list[Picture]]:
    return {name: pictures} if pictures else {}


def placed(text: str, pictures: Sequence[Picture], tag: str = IMAGE_TAG) -> list[Part]:
    """A question with its images at its tags, or in front of it if it has none.

    Raises:
        LeftOutError: there are more or fewer tags than images.
    """
    if tag not in text:
        return [*pictures, text]
    left = iter(pictures)
    parts = list(split_at(re.escape(tag), text, lambda _: next_picture(left, tag)))
    refuse_unplaced(left)
    return parts


def split_at(pattern: str, text: str, picture_of: Callable[[re.Match[str]], Picture]) -> Iterator[Part]:
    """The text with an image instead of each match; `picture_of(match)` gives it."""
    end = 0
    for found in re.finditer(pattern, text):
        yield from filter(None, [text[end : found.start()]])
        yield picture_of(found)
        end = found.end()
    yield from filter(None, [text[end:]])


def next_picture(pictures: Iterator[Picture], marker: str) -> Picture:
    """
    Raises:
        LeftOutError: there is none.
    """
    try:
        return next(pictures)
    except StopIteration:
        raise no_image_behind(marker) from None


def no_image_behind(marker: str) -> LeftOutError:
    return LeftOutError("no image behind a marker", f"{marker:.80}; expected an image for each marker")


def refuse_unplaced(pictures: Iterator[Picture] | Sequence[Picture]) -> None:
    """
    Raises:
        LeftOutError: there are images that no marker has placed.
    """
    if number := len(list(pictures)):
        raise LeftOutError("images without a marker", f"{number}; expected a marker for each image, or none at all")
