"""Questions whose helper images are parts of their image, given by boxes: LVR, Visual-CoT and LantErn.

LVR: image [one], conversations [{from, value}] with <lvr> in the answers, bboxes (0 to 1)
Visual-CoT: question, answer, image, width, height, bboxs (pixels), or image [path, "path###[x0, y0, x1, y1]"] and
    conversations that ask for the box first
LantErn: question, img_path, bboxs (pixels), reasoning_traces {pre_visual_text_think, post_visual_latent_reasoning,
    text_think, answer}
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.importing.chats import messages_of, role_of
from data_tools.importing.options import Options
from data_tools.importing.source_rows import Box, LeftOutError, Picture, SourceRow, to_picture
from data_tools.importing.turns import (
    GPT,
    Part,
    Row,
    Turn,
    next_picture,
    one_turn,
    placed,
    refuse_unplaced,
    rows_of_turns,
    split_at,
)
from mirage_ds.data.texts import IMAGE_TAG

_LARGEST_SIDE_PX = 2**31  # of any format of images
_LVR_TAG = "<lvr>"
_ANSWER_TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_PATH_AND_BOX = re.compile(r"(.*)###\s*(\[.*\])\s*")
# Visual-CoT's own sentence, to which its model answers with numbers; ours answers with a latent block.
_ASKS_FOR_BOX = re.compile(
    r"\s*Please provide the bounding box coordinate of the region that can help you answer the question better\."
)


def lvr(row: SourceRow, options: Options) -> list[Row]:
    """Each <lvr> is the next box's part of the image."""
    pictures = row.pictures("image")
    boxes = _boxes(row.get("bboxes"), "bboxes")
    if len(pictures) != 1 and boxes:
        raise LeftOutError("boxes with several images", f"images: {len(pictures)}; expected the one that has the boxes")
    for box in boxes:
        if max(box) > 1 or min(box) < 0:
            raise LeftOutError("a box is not within 0 and 1", f"{box}; expected parts of the width and height")
    left, crops = iter(pictures), iter([Picture(pictures[0].value, box, "sides", options.margin) for box in boxes])
    turns = []
    for message in messages_of(row, "conversations", "from", "value"):
        role, text = role_of(message.get("from")), message.get("value")
        if not isinstance(text, str):
            raise LeftOutError("a turn without a text", f"it has {text!r:.80}; expected a text")
        tag, images = (_LVR_TAG, crops) if role == GPT else (IMAGE_TAG, left)
        if role == GPT:
            text = _ANSWER_TAGS.sub(r"Answer: \1", text)
        turns.append(Turn(role, tuple(_split_by(tag, text, images))))
    refuse_unplaced(left)
    refuse_unplaced(crops)
    return rows_of_turns(turns, row.kept("dataset", "split", "question_id"), all_turns=options.all_turns)


def visual_cot(row: SourceRow, options: Options) -> list[Row]:
    """The answer follows the part, or parts, of the image that the boxes give."""
    if "conversations" in row.fields:
        return [_visual_cot_chat(row, options)]
    picture = row.picture("image")
    size = _size(row)
    boxes = _boxes(row.get("bboxs"), "bboxs")
    crops: list[Part] = [Picture(picture.value, box, "pixels", options.margin, size) for box in boxes]
    if not crops:
        raise LeftOutError("no box", "bboxs is empty; expected at least one")
    fields = row.kept("dataset", "split") | {"answer": row.text("answer")}
    return [one_turn([picture, row.text("question")], [*crops, row.text("answer")], fields)]


def _size(row: SourceRow) -> tuple[float, float] | None:
    """The width and height that a row says; None if it says none.

    Raises:
        LeftOutError: they are no numbers, nor texts of such.
    """
    values = row.get("width"), row.get("height")
    if values == (None, None):
        return None
    try:
        return float(row.text("width")), float(row.text("height"))
    except (ValueError, OverflowError) as error:
        raise LeftOutError("no width and height", f"they are {values!r:.80}; expected two numbers") from error


def _visual_cot_chat(row: SourceRow, options: Options) -> Row:
    """The form for LLaVA: a question, its box as numbers, the part of the image, the answer."""
    values = [picture.value for picture in row.pictures("image")]
    said = [message.get("value") for message in messages_of(row, "conversations", "from", "value")]
    marked = _PATH_AND_BOX.fullmatch(values[1]) if len(values) == 2 and isinstance(values[1], str) else None
    texts = [each for each in said if isinstance(each, str)]
    if marked is None or len(said) != 4 or len(texts) != 4:
        raise LeftOutError(
            "not a question, its box and its answer",
            f"turns: {len(said)}, images: {values!r:.80}; expected 4 turns and [path, path###[x0, y0, x1, y1]]",
        )
    numbers = re.findall(r"-?\d+(?:\.\d+)?", marked[2])
    picture = to_picture(values[0])
    question = _ASKS_FOR_BOX.sub("", texts[0]).replace(IMAGE_TAG, "").strip()
    (box,) = _boxes([[float(number) for number in numbers]], "image")
    fields = row.kept("id", "question_id", "dataset", "split") | {"answer": texts[3]}
    return one_turn([picture, question], [Picture(picture.value, box, "pixels", options.margin), texts[3]], fields)


def lantern(row: SourceRow, options: Options) -> list[Row]:
    """A text before the first part of the image, one after each, and the answer; without such texts a text row."""
    traces = row.get("reasoning_traces")
    if not isinstance(traces, Mapping):
        raise LeftOutError("no reasoning_traces", f"it is {traces!r:.80}; expected an object with an answer")
    picture, answer = row.picture("img_path"), SourceRow(row.where, row.folder, traces).text("answer")
    boxes = _boxes(row.get("bboxs"), "bboxs")
    before, alone = (_text_in(traces.get(name) or "", name) for name in ("pre_visual_text_think", "text_think"))
    parts: list[Part] = []
    if alone.strip():
        parts.append(f"{alone}\n")
    else:
        after = _texts_in(traces.get("post_visual_latent_reasoning"), len(boxes))
        parts += [f"{before}\n"] if before.strip() else []
        for box, text in zip(boxes, after, strict=True):
            parts += [Picture(picture.value, box, "pixels", options.margin), f"{text}\n"]
    parts.append(f"Answer: {answer}")
    return [one_turn(placed(row.text("question"), [picture]), parts, row.kept("id") | {"answer": answer})]


def _texts_in(value: Any, num_boxes: int) -> list[str]:
    """
    Raises:
        LeftOutError: it is not a text for each box, and at least one.
    """
    if not num_boxes or not isinstance(value, list) or len(value) != num_boxes:
        raise LeftOutError(
            "not one text for each box", f"boxes: {num_boxes}, texts: {value!r:.80}; expected as many, at least one"
        )
    return [_text_in(text, "post_visual_latent_reasoning") for text in value]


def _text_in(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise LeftOutError(f"no text in {name}", f"it is {value!r:.80}; expected a text")
    return value


def _split_by(tag: str, text: str, pictures: Iterator[Picture]) -> Iterator[Part]:
    return split_at(re.escape(tag), text, lambda _: next_picture(pictures, tag))


def _boxes(value: Any, name: str) -> list[Box]:
    """The boxes of a field: a list of them, or a single one.

    Raises:
        LeftOutError: one is not four numbers, or has no area.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    if values and not isinstance(values[0], list):
        values = [values]
    return [_box(each, name) for each in values]


def _box(value: Any, name: str) -> Box:
    if isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value):
        left, top, right, bottom = value
        if left < right and top < bottom and max(map(abs, value)) < _LARGEST_SIDE_PX:
            return left, top, right, bottom
    raise LeftOutError(
        f"no box in {name}", f"{value!r:.80}; expected [left, top, right, bottom], left < right, top < bottom"
    )
