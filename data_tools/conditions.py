"""Conditions on rows: `level=3`, `latent_blocks>=1`, `key<000000100`, `text_output~boxed`. Parsed, never evaluated.

FIELD OPERATOR VALUE. A row's own value decides the comparison: with a number VALUE must be a number, with true or false
it must be `true` or `false`, a text is compared as text; a key is a number of nine digits, whose zeros at the start may
be left out. A row without the field has null there.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirage_ds import strict_json
from mirage_ds.config import Stage
from mirage_ds.data.columns import IndexEntry
from mirage_ds.errors import DataError

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "~": operator.contains,
}
_FORM = re.compile(r"\s*([^\s=!<>~]+)\s*(!=|<=|>=|=|<|>|~)(.*)", re.DOTALL)
KEY_DIGITS = 9
TOKEN_FIELDS: dict[str, Stage] = {"tokens": "stage1", "tokens_text": "text"}
"""Fields that need a model -> the stage in which a row has so many tokens; stages 1 and 2 have the same."""
INDEX_FIELDS: dict[str, Callable[[IndexEntry], int | str]] = {
    "key": lambda entry: entry.key,
    "input_images": lambda entry: len(entry.input_sizes),
    "helper_images": lambda entry: len(entry.helper_sizes),
    "latent_blocks": lambda entry: entry.latent_blocks,
    "question_chars": lambda entry: entry.question_chars,
    "answer_chars": lambda entry: entry.answer_chars,
}
"""Fields that the index knows; all others are those of the row."""


@dataclass(frozen=True)
class Condition:
    """`field` compared with `value` by `operator`."""

    text: str  # as the user wrote it
    field: str
    operator: str
    value: str

    @property
    def is_of_row(self) -> bool:
        """Whether the row's JSON has to be read for it."""
        return self.field not in INDEX_FIELDS and self.field not in TOKEN_FIELDS

    def holds(self, fields: Mapping[str, Any], where: str) -> bool:
        """Whether a row with these fields meets it.

        Raises:
            DataError: the row's value cannot be compared with `value`; the message names `where`.
        """
        found = fields.get(self.field)
        if found is None or self.value == "null":
            same = found is None and self.value == "null"
            return {"=": same, "!=": not same}.get(self.operator, False)
        wanted = self._as_kind_of(found, where)
        return OPERATORS[self.operator](found, wanted)

    def _as_kind_of(self, found: Any, where: str) -> Any:
        """`value` as what can be compared with a row's value."""
        kind = type(found)
        if kind is str:
            return self.value
        try:
            value = strict_json.loads(self.value)
        except ValueError:
            value = None
        if kind is bool and type(value) is bool and self.operator in ("=", "!="):
            return value
        if kind in (int, float) and type(value) in (int, float) and self.operator != "~":
            return value
        raise DataError(
            f"{self.field} is {strict_json.dumps(found):.80} in the row ({where}), which --where {self.text!r} cannot "
            "be compared with; allowed: numbers with = != < <= > >= and a number, true and false with = and !=, texts "
            "with all of these and ~ (contains); correct the condition"
        )


def parse_condition(text: str) -> Condition:
    """Reads FIELD OPERATOR VALUE; blanks around VALUE do not count.

    Raises:
        DataError: the text has another form.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise DataError(
            f"not a condition (--where {text!r}); allowed: FIELD, one of {' '.join(OPERATORS)}, and a value; write for "
            "example --where 'latent_blocks>=1'"
        )
    field, compared, value = match[1], match[2], match[3].strip()
    if field == "key" and compared != "~":
        if not re.fullmatch(f"[0-9]{{1,{KEY_DIGITS}}}", value):
            raise DataError(
                f"{value!r:.80} is no key (--where {text!r}); a key is the number of a row in {KEY_DIGITS} digits; "
                "write a number, for example --where 'key<100'"
            )
        value = value.zfill(KEY_DIGITS)
    return Condition(text, field, compared, value)


def check_known(conditions: Sequence[Condition], seen: Mapping[str, int], where: str) -> None:
    """Refuses a field that no row has.

    Args:
        seen: the fields of the rows, and how many rows have each.
    Raises:
        DataError: the message lists the fields that there are.
    """
    for condition in conditions:
        if condition.is_of_row and condition.field not in seen:
            own = sorted(seen.keys() - INDEX_FIELDS.keys() - TOKEN_FIELDS.keys())
            listed = ", ".join([*INDEX_FIELDS, *TOKEN_FIELDS, *own])
            raise DataError(
                f"no row has the field {condition.field} (--where {condition.text!r}, {where}); fields: {listed:.400}; "
                "correct the condition"
            )
