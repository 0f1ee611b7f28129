"""Chat files: ShareGPT and OpenAI's messages; CoVT, whose rows are such chats; and Monet's interleaved messages.

ShareGPT: {conversations: [{from, value}], images}; CoVT: the same with `image`; OpenAI: {messages: [{role, content}]};
Monet (its src/task.py): {metadata: {dataset_name, sample_id}, data: [{role, content: [{type, text or image}]}]}
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.importing.options import Options
from data_tools.importing.source_rows import LeftOutError, Picture, SourceRow, to_picture
from data_tools.importing.turns import (
    HUMAN,
    ROLES,
    SYSTEM,
    Part,
    Row,
    Turn,
    next_picture,
    no_image_behind,
    refuse_unplaced,
    rows_of_turns,
    split_at,
)
from mirage_ds.data.texts import IMAGE_TAG

_NO_IMAGES = ("video", "videos", "audio", "audios")
_NO_IMAGE_TAG = re.compile("<(?:video|audio)>")
_MONET_LATENTS = re.compile(r"<abs_vis_token>.*?</abs_vis_token>\s*", re.DOTALL)
_MONET_OBSERVATION = re.compile(r"</?observation>")


def sharegpt(row: SourceRow, options: Options) -> list[Row]:
    """`<image>` in any turn stands for the next of the images; without any, they are in front of the first question."""
    return _chat(row, "conversations", "from", "value", options)


def openai(row: SourceRow, options: Options) -> list[Row]:
    """The content is a text, or a list of texts and images."""
    return _chat(row, "messages", "role", "content", options)


def monet(row: SourceRow, options: Options) -> list[Row]:
    """Each image of an answer, and the latent marker before it, is a latent block.

    The system turn is left out: it speaks of Monet's own tokens.
    """
    turns = []
    for message in messages_of(row, "data", "role", "content"):
        turn = Turn(role_of(message.get("role")), tuple(_content(message.get("content"), iter(()))))
        if turn.role != SYSTEM:
            turns.append(Turn(turn.role, tuple(_without_monet_tokens(turn.parts))))
    metadata = row.get("metadata")
    fields = {}
    if isinstance(metadata, Mapping):
        fields = {name: metadata[name] for name in ("dataset_name", "sample_id") if metadata.get(name) is not None}
    return rows_of_turns(turns, fields, all_turns=options.all_turns)


def messages_of(row: SourceRow, name: str, *read: str) -> list[Mapping[str, Any]]:
    """The turns of a field. What they have beside the fields `read` is reported as ignored.

    Raises:
        LeftOutError: it is no list of objects, or a turn calls tools.
    """
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise LeftOutError(f"no turns in {name}", f"it is {value!r:.80}; expected a list of objects")
    for message in value:
        if calls := message.get("tool_calls") or message.get("function_call"):
            raise LeftOutError("a turn with calls of tools", f"{calls!r:.80}; expected turns without")
        row.unread |= {f"{name}.{key}" for key, value in message.items() if key not in read and value is not None}
    return value


def role_of(value: Any) -> str:
    """
    Raises:
        LeftOutError: it is none that we have, such as that of a tool.
    """
    role = ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise LeftOutError("a turn of another role", f"{value!r:.80}; expected one of {', '.join(ROLES)}")
    return role


def _chat(row: SourceRow, name: str, role_name: str, content_name: str, options: Options) -> list[Row]:
    for field in _NO_IMAGES:
        if row.get(field):
            raise LeftOutError("a video or sound", f"in the field {field}; expected texts and images")
    pictures = row.pictures("images") or row.pictures("image")
    left = iter(pictures)
    turns = []
    for message in messages_of(row, name, role_name, content_name, "weight"):
        parts = tuple(_content(message.get(content_name), left))
        if (weight := message.get("weight")) not in (None, 0, 1):
            raise LeftOutError("a turn with a weight", f"{weight!r:.80}; expected 1, or 0 for an answer not to train")
        turns.append(Turn(role_of(message.get(role_name)), parts, train=weight != 0))
    if isinstance(row.fields.get("system"), str) and row.text("system") and turns and turns[0].role != SYSTEM:
        turns.insert(0, Turn(SYSTEM, (row.text("system"),)))
    if any(turn.pictures for turn in turns):
        refuse_unplaced(left)
    elif (first := next((number for number, turn in enumerate(turns) if turn.role == HUMAN), None)) is not None:
        turns[first] = Turn(HUMAN, (*pictures, *turns[first].parts))
    return rows_of_turns(turns, row.kept("id"), all_turns=options.all_turns)


def _content(content: Any, pictures: Iterator[Picture]) -> Iterator[Part]:
    """The texts and images of a turn.

    Args:
        content: a text, or a list of objects with a type.
        pictures: the row's, for markers that have no image of their own.

    Raises:
        LeftOutError: something of another form.
    """
    if isinstance(content, str):
        if found := _NO_IMAGE_TAG.search(content):
            raise LeftOutError("a video or sound", f"{found[0]} in a turn; expected texts and images")
        yield from split_at(re.escape(IMAGE_TAG), content, lambda _: next_picture(pictures, IMAGE_TAG))
        return
    if not isinstance(content, list):
        raise LeftOutError("a turn without a text", f"it has {content!r:.80}; expected a text, or a list of objects")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from _content(part["text"], pictures)
        elif kind in ("image", "image_url"):
            yield _picture_in(part) or next_picture(pictures, f"a part of type {kind}")
        else:
            raise LeftOutError("a part of another type", f"{part!r:.80}; expected text, image or image_url")


def _picture_in(part: Mapping[str, Any]) -> Picture | None:
    value = part.get("image") if part.get("image") is not None else part.get("image_url")
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return None if value is None else to_picture(value)


def _without_monet_tokens(parts: tuple[Part, ...]) -> Iterator[Part]:
    """
    Raises:
        LeftOutError: a latent marker with no image after it.
    """
    for number, part in enumerate(parts):
        if isinstance(part, str):
            if number + 1 < len(parts) and isinstance(parts[number + 1], Picture):
                *_, last = (None, *_MONET_LATENTS.finditer(part))
                if last is not None and last.end() == len(part):
                    part = part[: last.start()]
            if found := _MONET_LATENTS.search(part):
                raise no_image_behind(found[0].strip())
            part = _MONET_OBSERVATION.sub("", part)
        if part:
            yield part
