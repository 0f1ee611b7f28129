"""Reasoning with images in it: Zebra-CoT, ThinkMorph, V-Interaction and CoMT.

The answer is the reasoning, with a latent block for each of its images, and a last line `Answer: ...`, which the tasks
`exact` and `choice` of `mirage evaluate` read.

Zebra-CoT: Question, Text Reasoning Trace, Final Answer, problem_image_N, reasoning_image_N
ThinkMorph: pid, question, answer, problem_image_0, resoning_thought_N (so spelt), reasoning_image_N
V-Interaction: id, question, image, edited_image, CoT_with_code, answer
CoMT: id, question, option, image, rationale, answer, type
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.importing.options import Options
from data_tools.importing.questions import with_options, without_letters
from data_tools.importing.source_rows import LeftOutError, Picture, SourceRow
from data_tools.importing.turns import Part, Row, no_image_behind, one_turn, placed, refuse_unplaced, split_at

_ZEBRA_MARKER = r"(?i)<image_start>\s*\[?\s*(?P<name>[^\[\]<>]*?)\s*\]?\s*<image_end>|\[\s*(?P<bare>\w*image_\d+)\s*\]"
_ZEBRA_TAG = re.compile(r"<image_(?:start|end)>", re.IGNORECASE)
_ZEBRA_HEADING = re.compile(r"^[ \t]*THOUGHT \d+:[ \t]*", re.MULTILINE)
_CODE = r"```[\s\S]*?```|<code>[\s\S]*?</code>"
_COMT_MARKER = r"(?P<bracket>\[(?=\w+\])|<(?=\w+>)|\((?=\w+\)))?\b(?P<name>IMAGE\d+)\b(?(bracket)[\])>])"
_COMT_IMAGE = re.compile(r"\[?(IMAGE\d+):([^\]]*)\]?")
_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")


def zebra_cot(row: SourceRow, _: Options) -> list[Row]:
    """Headings such as `THOUGHT 1:` are left out."""
    problem, reasoning = row.numbered_pictures("problem_image_"), row.numbered_pictures("reasoning_image_")
    question, asked = _named(row.text("Question"), problem, _ZEBRA_MARKER)
    if asked:
        refuse_unplaced([picture for name, picture in problem.items() if name not in asked])
    else:
        question = [*problem.values(), *question]
    trace, drawn = _named(_ZEBRA_HEADING.sub("", row.text("Text Reasoning Trace")), problem | reasoning, _ZEBRA_MARKER)
    refuse_unplaced([picture for name, picture in reasoning.items() if name not in drawn])
    for part in (*question, *trace):
        if isinstance(part, str) and (left := _ZEBRA_TAG.search(part)):
            raise no_image_behind(part[left.start() :])
    answer = row.text("Final Answer")
    return [one_turn(question, [*trace, *_last_line(answer)], {"answer": answer})]


def thinkmorph(row: SourceRow, _: Options) -> list[Row]:
    """Each reasoning image stands between two thoughts."""
    pictures = list(row.numbered_pictures("reasoning_image_").values())
    names = [name for name in row.fields if name.startswith("resoning_thought_") and row.get(name) is not None]
    if len(names) != len(pictures) + 1 or not pictures:
        raise LeftOutError(
            "not one image between each two thoughts",
            f"thoughts: {len(names)}, images: {len(pictures)}; expected one thought more than images",
        )
    trace: list[Part] = [row.text("resoning_thought_0").strip()]
    for number, picture in enumerate(pictures, start=1):
        trace += ["\n", picture, "\n", row.text(f"resoning_thought_{number}").strip()]
    question = placed(row.text("question"), list(row.numbered_pictures("problem_image_").values()))
    answer = row.text("answer")
    return [one_turn(question, [*trace, *_last_line(answer)], row.kept("pid", "task") | {"answer": answer})]


def v_interaction(row: SourceRow, _: Options) -> list[Row]:
    """The edited image takes the place of the code that draws it, or is in front of a reasoning without code."""
    reasoning, edited = row.text("CoT_with_code"), row.picture("edited_image")
    blocks = re.findall(_CODE, reasoning)
    if len(blocks) > 1:
        raise LeftOutError(
            "several pieces of code for one edited image", f"pieces: {len(blocks)}; expected one, or none"
        )
    trace = list(split_at(_CODE, reasoning, lambda _: edited)) if blocks else [edited, reasoning]
    answer = row.text("answer")
    question = placed(row.text("question"), row.pictures("image"))
    return [one_turn(question, [*trace, *_last_line(answer)], row.kept("id") | {"answer": answer})]


def comt(row: SourceRow, _: Options) -> list[Row]:
    """An image that the rationale names is a helper image there; those that the question names, or else all that the
    rationale does not name, are the question's.

    Raises:
        LeftOutError: the rationale names all images and the question none, so that it is not known which it sees.
    """
    pictures = _comt_pictures(row)
    options = row.get("option")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise LeftOutError("no list of texts in option", f"it is {options!r:.80}; expected the options")
    options = without_letters(options)
    trace, drawn = _named(row.text("rationale"), pictures, _COMT_MARKER)
    question, asked = _named(with_options(row.text("question"), options), pictures, _COMT_MARKER)
    others = {name: picture for name, picture in pictures.items() if name not in drawn}
    if asked:
        refuse_unplaced([picture for name, picture in others.items() if name not in asked])
    elif pictures and not others:
        raise LeftOutError(
            "the rationale names all images", f"{', '.join(pictures)}; expected one that it does not, for the question"
        )
    else:
        question = [*others.values(), *question]
    answer = row.text("answer")
    fields = row.kept("id", "type") | {"options": options, "answer": answer}
    return [one_turn(question, [*trace, *_last_line(answer)], fields)]


def _comt_pictures(row: SourceRow) -> dict[str, Picture]:
    """The images by their names: `IMAGE0:ID` is the file ID of the folder images/TYPE."""
    found = {}
    for number, picture in enumerate(row.pictures("image")):
        named = _COMT_IMAGE.fullmatch(picture.value) if isinstance(picture.value, str) else None
        if named:
            found[named[1]] = Picture(_comt_file(row.folder, str(row.get("type")), named[2].strip()))
        else:
            found[f"IMAGE{number}"] = picture
    return found


def _comt_file(folder: Path, kind: str, name: str) -> str:
    """The path of a file whose suffix may be left out; that of the plain name if there is none."""
    for path in (Path("images", kind, name), Path(kind, name), Path("images", name), Path(name)):
        for suffix in _SUFFIXES:
            if os.path.isfile(folder / f"{path}{suffix}"):  # not Path.is_file, which raises for a name too long
                return f"{path}{suffix}"
    return str(Path("images", kind, name))


def _named(text: str, pictures: Mapping[str, Picture], marker: str) -> tuple[list[Part], set[str]]:
    """The text with an image at each marker, whose last group that is there names it; and the names in it.

    Raises:
        LeftOutError: a marker names an image that the row has not.
    """
    names: set[str] = set()

    def picture_of(found: re.Match[str]) -> Picture:
        name = str(found[found.lastgroup or 0])
        name = name if name in pictures else name.lower()
        if name not in pictures:
            raise no_image_behind(found[0])
        names.add(name)
        return pictures[name]

    return list(split_at(marker, text, picture_of)), names


def _last_line(answer: Any) -> list[Part]:
    return [f"\nAnswer: {answer}"]
