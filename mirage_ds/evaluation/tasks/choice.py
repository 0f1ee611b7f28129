"""Scores multiple choice: the option that an answer gives, as its letter or its text, against the right one.

An answer that gives no option, or may mean two, is "Invalid": nothing is guessed.
"""

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.exact import expected_text
from mirage_ds.evaluation.tasks.given import SURROUNDING, canonical, extract_given, plain
from mirage_ds.evaluation.tasks.outcome import INVALID, Outcome

Options = dict[str, str]
"""The text of each option by its letter, A to Z."""

# (A) red, A. red, A) red, A: red; the letter alone too. Not "A red", whose A may be an article.
_LABELLED = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]*(?: (.*))?")
_IN_QUESTION = re.compile(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[.):])[ \t]+", re.MULTILINE)
_REMEDY = "fix the row, or score it as another task"


def score(row: Mapping[str, Any], answer: str) -> Outcome:
    """ "Right", "Wrong" or "Invalid".

    Args:
        row: its fields; options are `options`, or else those that `text_input` lists; the right one is `answer`, its
            letter or its text, or else what `text_output` gives.

    Raises:
        DataError: the row has no options, or no right one.
    """
    options = options_of(row)
    expected = read_option(expected_text(row), options)
    if expected is None:
        raise DataError(
            f"the right answer is {expected_text(row)!r:.80} (in a row that is to be scored); expected one of the "
            f"letters {', '.join(options)} or an option's text, in the field answer or in text_output; {_REMEDY}"
        )
    given = read_option(extract_given(answer), options)
    status = INVALID if given is None else "Right" if given == expected else "Wrong"
    return Outcome(status == "Right", status, given or "", expected)


def read_option(text: str, options: Options) -> str | None:
    """The letter of the option that a text names, alone: its letter, its text, or both; None if it is not clear."""
    named = {letter for letter, option in options.items() if canonical(option) == canonical(text)}
    letter, rest = _labelled(text)
    if letter in options and (not rest or canonical(rest) == canonical(options[letter])):
        named.add(letter)
    return named.pop() if len(named) == 1 else None


def _labelled(text: str) -> tuple[str, str]:
    """The letter with which a text begins, and what follows; both empty if it begins with no letter."""
    found = _LABELLED.fullmatch(plain(text).strip(SURROUNDING + " "))
    return ((found[1] or found[2]).upper(), found[3] or "") if found else ("", "")


def options_of(row: Mapping[str, Any]) -> Options:
    """The options of a row: its `options`, a list of texts or {letter: text}, or else those of its question.

    Raises:
        DataError: there are fewer than two or more than 26, or they are no texts.
    """
    value = row.get("options")
    if value is None:
        return _options_in(str(row.get("text_input") or ""))
    texts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    letters = [letter.strip().upper() for letter in value] if isinstance(value, dict) else ascii_uppercase
    options = {letter: str(text) for letter, text in zip(letters, texts, strict=False) if _is_text(text)}
    if not 2 <= len(options) == len(texts) or not set(options) <= set(ascii_uppercase):
        raise DataError(
            f"options is {value!r:.80} (in a row that is to be scored); expected a list of 2 to 26 texts, or an object "
            f"of letters and texts; {_REMEDY}"
        )
    labels = {letter: _labelled(text) for letter, text in options.items()}
    if all(label == letter and rest for letter, (label, rest) in labels.items()):  # ["A. red", "B. blue"]
        return {letter: rest for letter, (_, rest) in labels.items()}
    return options


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(canonical(str(value)))


def _options_in(question: str) -> Options:
    """The options that a question lists, from A on: each ends where the next begins, or with its line."""
    lists: list[list[re.Match[str]]] = []
    for label in _IN_QUESTION.finditer(question):
        letter = label[1] or label[2]
        if letter == "A":
            lists.append([label])
        elif lists and letter == chr(ord("A") + len(lists[-1])):
            lists[-1].append(label)
    lists = [labels for labels in lists if len(labels) > 1]
    if len(lists) != 1:
        raise DataError(
            f"lists of options in text_input: {len(lists)} (in a row that is to be scored); expected the options in "
            'the field options, or one list "A. ... B. ..." or "(A) ... (B) ..." in the question; add the field'
        )
    (labels,) = lists
    ends = [*(label.start() for label in labels[1:]), len(question)]
    return {
        label[1] or label[2]: question[label.end() : end].partition("\n")[0].strip()
        for label, end in zip(labels, ends, strict=True)
    }
