"""Groups of rows that are quoted separately: by a field of the rows (`--by`), else by their level (`level_of`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.answers import Answer

MAX_GROUPS = 50
NO_VALUE = "-"  # the group of rows that lack the field


def check_groups(rows: Sequence[Mapping[str, Any]], by: str | None) -> None:
    """Refuses a field that makes no groups; call it before decoding.

    Args:
        rows: the fields of each row.

    Raises:
        ConfigError: no row has it, or it has more than MAX_GROUPS values.
    """
    if by is None:
        return
    if not any(by in row for row in rows):
        names = ", ".join(sorted({name for row in rows for name in row})) or "none"
        raise ConfigError(f"no row has the field {by!r:.80} (--by); the rows have {names:.200}; name one of them")
    values = {_text(row, by) for row in rows}
    if len(values) > MAX_GROUPS:
        raise ConfigError(
            f"the field {by!r:.80} has {len(values)} values (--by); at most {MAX_GROUPS} groups are shown; name a "
            "field with fewer values"
        )


def grouped(answers: Iterable[Answer], by: str | None = None) -> dict[str, list[Answer]]:
    """Answers by the text of their row's field, in the order of the texts, numbers by size.

    Without a field, rows are grouped by their level, if they have one, and not more than MAX_GROUPS.
    """
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(level_of(answer.row) if by is None else _text(answer.row, by), []).append(answer)
    if by is None and (set(groups) <= {NO_VALUE} or len(groups) > MAX_GROUPS):
        return {}
    return {name: groups[name] for name in sorted(groups, key=_in_order)}


def level_of(row: Mapping[str, Any]) -> str:
    """The side of a row's map; the row's own `level` if it has no map."""
    map_desc = row.get("map_desc")
    return str(len(map_desc)) if isinstance(map_desc, list) else _text(row, "level")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return NO_VALUE if value is None else value if isinstance(value, str) else strict_json.dumps(value)


def _in_order(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
