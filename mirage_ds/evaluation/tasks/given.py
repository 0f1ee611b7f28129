r"""What an answer's text gives as the answer, and when two such pieces of text are the same.

1. If the text has a \boxed{...}, the content of the last one.
2. Else, if it has "Answer:" or "answer is", what stands after the last one, to the end of its line; if nothing does,
   the next line that is not empty.
3. Else all of it, without a <think> ... </think> in front.
"""

import re
import unicodedata

BOX = "\\boxed{"
SURROUNDING = ".,;:'\"`*_$\u2018\u2019\u201c\u201d\u3002"  # quotes, full stops, Markdown, LaTeX
_ANSWER = re.compile(r"\banswer[*_]*\s*(?::[*_]*|is\b[*_]*:?)", re.IGNORECASE)
_THINK_END = "</think>"
_STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"([-+]?)(\d+|\d{1,3}(?:,\d{3})+)?(?:\.(\d*))?", re.ASCII)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, whose braces may nest; None if there is none or it is not closed."""
    _, box, rest = text.rpartition(BOX)
    depth = 1 if box else 0
    for place, character in enumerate(rest if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
    return None


def extract_given(text: str) -> str:
    """What a text gives as the answer, by the rules above; empty if its last box is not closed, or nothing is there."""
    if BOX in text:
        return extract_boxed(text) or ""
    marks = list(_ANSWER.finditer(text))
    if not marks:
        return text.rpartition(_THINK_END)[2].strip()
    lines = (line.strip() for line in text[marks[-1].end() :].splitlines())
    return next((line for line in lines if line), "")


def canonical(text: str) -> str:
    r"""Equal for two pieces of text that are the same answer; empty if there is nothing.

    Case, white space, LaTeX's \\text{...} around words, and SURROUNDING at both ends do not matter. A number is its
    value: 1,000 and 1000.0 are the same. No unit, article or bracket is left out: 12 cm is not 12.
    """
    text = plain(text)
    bare = text.rstrip(SURROUNDING + " ").lstrip(SURROUNDING.replace(".", "") + " ") or text  # .5 is a number
    return _number(bare) or bare.casefold()


def plain(text: str) -> str:
    r"""A text in one line, with single blanks, and the words of LaTeX's \text{...} only."""
    return " ".join(_STYLE.sub(r"\1", unicodedata.normalize("NFC", text)).split())


def _number(text: str) -> str | None:
    """The digits of a decimal number without those that do not matter; None if it is none."""
    found = _NUMBER.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return None
    whole = (found[2] or "").replace(",", "").lstrip("0") or "0"
    fraction = (found[3] or "").rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if found[1] == "-" and value != "0" else value
