"""Multiple choice for `mirage evaluate --task choice`: BLINK, V*, MMVP, HRBench and SAT.

BLINK: idx, question, prompt, choices, answer "(A)", image_1 to image_4
V*: image, text (with its options), label, category, question_id
MMVP: Index, Question, Options "(a) .. (b) ..", Correct Answer; the image is the file Index.jpg, or `image`
HRBench: index, question, A to D, answer, image, cycle_category
SAT: image_bytes, question, answers, question_type, correct_answer
"""

import re
from collections.abc import Iterable, Sequence
from string import ascii_lowercase, ascii_uppercase

from data_tools.importing.options import Options
from data_tools.importing.source_rows import LeftOutError, Picture, SourceRow
from data_tools.importing.turns import Row, one_turn, placed, question_row

_MMVP_OPTION = re.compile(r"(?:^|\s)\(([a-z])\)\s*")  # not the end of a word, as in `Cat(s)`
_OWN_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.:)])\s*")


def with_options(question: str, options: Iterable[str]) -> str:
    """The question with a line for each option."""
    lines = (f"\n({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return question.rstrip() + "".join(lines)


def without_letters(options: Sequence[str]) -> list[str]:
    """The options without the letters in front of them, if each has its own, such as `(A) 30` or `A. 30`."""
    found = [_OWN_LETTER.match(option) for option in options]
    if [match and (match[1] or match[2]) for match in found] != list(ascii_uppercase[: len(options)]):
        return list(options)
    return [option[match.end() :] for option, match in zip(options, found, strict=True) if match]


def blink(row: SourceRow, _: Options) -> list[Row]:
    """`prompt` has the question and its options."""
    options = _texts(row, "choices")
    fields = row.kept("idx", "sub_task", "question") | {"options": options, "answer": row.text("answer")}
    pictures = [picture for number in range(1, 5) for picture in row.pictures(f"image_{number}")]
    if not pictures:
        raise LeftOutError("no image", "image_1 to image_4 are missing; expected at least one")
    return [question_row(placed(row.text("prompt"), pictures), fields)]


def vstar(row: SourceRow, _: Options) -> list[Row]:
    """The options are those that the question lists."""
    fields = row.kept("question_id", "category") | {"answer": row.text("label")}
    return [question_row(placed(row.text("text"), [row.picture("image")]), fields)]


def mmvp(row: SourceRow, _: Options) -> list[Row]:
    """Without a field `image` it is the file that has the index as its name."""
    index = row.text("Index")
    picture = row.picture("image") if row.fields.get("image") is not None else Picture(f"{index}.jpg")
    before, *found = _MMVP_OPTION.split(row.text("Options"))
    options = [text.strip() for text in found[1::2]]
    if before.strip() or not options or found[::2] != list(ascii_lowercase[: len(options)]):
        raise LeftOutError("no options", f"{row.get('Options')!r:.80}; expected (a) ... (b) ..., in this order")
    fields = {"index": index, "options": options, "answer": row.text("Correct Answer")}
    return [question_row([picture, with_options(row.text("Question"), options)], fields)]


def hrbench(row: SourceRow, _: Options) -> list[Row]:
    options = [row.text(letter) for letter in "ABCD"]
    fields = row.kept("index", "category", "cycle_category") | {"options": options, "answer": row.text("answer")}
    image = row.picture("image")
    value = {"bytes": image.value} if isinstance(image.value, str) else image.value
    return [question_row([Picture(value), with_options(row.text("question"), options)], fields)]


def sat(row: SourceRow, _: Options) -> list[Row]:
    """Rows with an answer, so that they can be trained on as text too."""
    options, answer = _texts(row, "answers"), row.text("correct_answer")
    if answer not in options:
        raise LeftOutError(
            "the right answer is not among the options", f"{answer!r:.80}; expected one of {options!r:.80}"
        )
    pictures = row.pictures("image_bytes")
    if not pictures:
        raise LeftOutError("no image", "image_bytes is empty; expected at least one")
    question = placed(with_options(row.text("question"), options), pictures)
    return [one_turn(question, [answer], row.kept("question_type") | {"options": options, "answer": answer})]


def _texts(row: SourceRow, name: str) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str) and each for each in value):
        raise LeftOutError(f"no list of texts in {name}", f"it is {value!r:.80}; expected at least two options")
    return value
