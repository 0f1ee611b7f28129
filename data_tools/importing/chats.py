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

_MONET_LATENTS = re.compile(r"<abs_vis_token>.*?</abs_vis_token>\s*", re.DOTALL)
_MONET_OBSERVATION = re.compile(r"</?observation>")


def sharegpt(row: SourceRow, options: Options) -> list[Row]:
    """`<image>` in any turn stands for the next of the images; without any, they are in front of the first question."""
    said = [(each.get("from"), each.get("value")) for each in messages_of(row, "conversations")]
    return _chat(row, said, options)


def openai(row: SourceRow, options: Options) -> list[Row]:
    """The content is a text, or a list of texts and images."""
    said = [(each.get("role"), each.get("content")) for each in messages_of(row, "messages")]
    return _chat(row, said, options)


def monet(row: SourceRow, options: Options) -> list[Row]:
    """Each image of an answer, and the latent marker before it, is a latent block.

    The system turn is left out: it speaks of Monet's own tokens.
    """
    turns = []
    for message in messages_of(row, "data"):
        turn = Turn(role_of(message.get("role")), tuple(_content(message.get("content"), iter(()))))
        if turn.role != SYSTEM:
            turns.append(Turn(turn.role, tuple(_without_monet_tokens(turn.parts))))
    metadata = row.get("metadata")
    fields = {}
    if isinstance(metadata, Mapping):
        fields = {name: metadata[name] for name in ("dataset_name", "sample_id") if metadata.get(name) is not None}
    return rows_of_turns(turns, fields, all_turns=options.all_turns)


def messages_of(row: SourceRow, name: str) -> list[Mapping[str, Any]]:
    """
    Raises:
        LeftOutError: it is no list of objects.
    """
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise LeftOutError(f"no turns in {name}", f"it is {value!r:.80}; expected a list of objects")
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


def _chat(row: SourceRow, said: list[tuple[Any, Any]], options: Options) -> list[Row]:
    pictures = row.pictures("images") or row.pictures("image")
    left = iter(pictures)
    turns = [Turn(role_of(role), tuple(_content(content, left))) for role, content in said]
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
