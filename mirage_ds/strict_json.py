"""JSON that every program reads alike: each key once, no NaN, UTF-8 with or without a byte order mark.

Python's own reader keeps the last of two equal keys, and reads and writes NaN, which is no JSON.
"""

import json
import math
import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', re.DOTALL)


class _RepeatedKeyError(ValueError):
    pass


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON in UTF-8, or a key stands twice in an object (with both lines), or a number is not
            finite.
    """
    decoded = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff")
    try:
        return json.loads(
            decoded, object_pairs_hook=_each_once, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except _RepeatedKeyError:
        key, first, second = _find_repeated(decoded)
        lines = f" (lines {first} and {second})" if second > 1 else ""
        raise ValueError(f"the key {key:.80} stands twice{lines}") from None


def dumps(value: Any, *, indent: int | None = None) -> str:
    """The JSON text of a value; a number that is not finite becomes null."""
    return json.dumps(_without_nan(value), allow_nan=False, indent=indent)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _RepeatedKeyError
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write a number or null")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.80} is too large")
    return value


def _find_repeated(text: str) -> tuple[str, int, int]:
    """The first key that stands twice in one object of valid JSON, in quotes, and the lines of both."""
    objects: list[dict[str, int]] = []
    string = ""
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            objects.append({})
        elif token[0] in "}]":
            objects.pop()
        elif token[0] == ":":
            line = text.count("\n", 0, token.start()) + 1
            if string in objects[-1]:
                return string, objects[-1][string], line
            objects[-1][string] = line
        else:
            string = json.dumps(json.loads(token[0]))
    raise AssertionError("the reader found a repeated key")
