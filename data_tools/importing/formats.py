"""The formats: how each makes our rows of one of its own, and by what its rows are recognised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.importing import boxes, chats, own_rows, questions, traces
from data_tools.importing.options import Options
from data_tools.importing.source_rows import SourceRow
from data_tools.importing.turns import Row

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A published layout of rows."""

    name: str
    rows: Callable[[SourceRow, Options], list[Row]]  # LeftOutError: the row cannot be imported
    looks: Callable[[Fields], bool]  # whether a row may be one of this format
    boxes: bool = False  # it has boxes, for --margin
    turns: bool = False  # it may have several turns, for --all-turns
    choice: bool = False  # its rows are scored by the task choice


def has(*names: str) -> Callable[[Fields], bool]:
    """Whether all these fields are there."""
    return lambda fields: fields.keys() >= set(names)


def _visual_cot(fields: Fields) -> bool:
    image = fields.get("image")
    with_box = isinstance(image, list) and any("###[" in each for each in image if isinstance(each, str))
    return fields.keys() >= {"question", "answer", "image", "bboxs"} or with_box


def _covt(fields: Fields) -> bool:
    return fields.keys() >= {"id", "image", "conversations"} and not _visual_cot(fields) and "bboxes" not in fields


# In the order in which `auto` asks them: those that others' fields could be mistaken for come last.
FORMATS = {
    format.name: format
    for format in (
        Format("mirage", own_rows.mirage, lambda fields: "text_input" in fields or _own_turns(fields)),
        Format("monet", chats.monet, has("metadata", "data"), turns=True),
        Format("zebra-cot", traces.zebra_cot, has("Question", "Text Reasoning Trace", "Final Answer")),
        Format("thinkmorph", traces.thinkmorph, has("question", "answer", "resoning_thought_0")),
        Format("v-interaction", traces.v_interaction, has("question", "answer", "edited_image", "CoT_with_code")),
        Format("lvr", boxes.lvr, has("image", "conversations", "bboxes"), boxes=True, turns=True),
        Format("visual-cot", boxes.visual_cot, _visual_cot, boxes=True),
        Format("lantern", boxes.lantern, has("question", "img_path", "reasoning_traces"), boxes=True),
        Format("comt", traces.comt, has("question", "option", "image", "rationale", "answer"), choice=True),
        Format("sat", questions.sat, has("image_bytes", "question", "answers", "correct_answer"), choice=True),
        Format("blink", questions.blink, has("prompt", "choices", "answer", "image_1"), choice=True),
        Format("vstar", questions.vstar, has("image", "text", "label", "question_id"), choice=True),
        Format("mmvp", questions.mmvp, has("Index", "Question", "Options", "Correct Answer"), choice=True),
        Format("hrbench", questions.hrbench, has("question", "A", "B", "C", "D", "answer", "image"), choice=True),
        Format("covt", chats.sharegpt, _covt, turns=True),
        Format("openai", chats.openai, has("messages"), turns=True),
        Format("sharegpt", chats.sharegpt, has("conversations"), turns=True),
    )
}


def _own_turns(fields: Fields) -> bool:
    return "conversations" in fields and not {"image_input", "image_output", "train_answers"}.isdisjoint(fields)


AUTO = "auto"


def recognise(fields: Fields) -> Format | None:
    """The first format that a row may be of."""
    return next((format for format in FORMATS.values() if format.looks(fields)), None)
