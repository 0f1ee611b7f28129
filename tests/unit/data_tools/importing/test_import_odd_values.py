"""Whatever stands in a field of a published row, the row is taken or left out with a reason: nothing ends an import."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imported import import_file
from published_rows import examples, write_published

ODD: list[Any] = [None, 5, 0.5, True, "", "x", "<image>", [], [[]], [None], ["x"], {}, {"a": 1}, "\ud83d", 10**400]


def changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it, at any depth, that is missing or something else."""
    yield from ODD
    if isinstance(value, dict):
        for name in value:
            yield {other: value[other] for other in value if other != name}
            for odd in changed(value[name]):
                yield value | {name: odd}
    if isinstance(value, list):
        for number in range(len(value)):
            for odd in changed(value[number]):
                yield [*value[:number], odd, *value[number + 1 :]]


@pytest.mark.parametrize("name", examples())
def test_odd_values(tmp_path: Path, name: str) -> None:
    published, _ = examples()[name]
    source = write_published(tmp_path / name, name, published)
    (row,) = json.loads(source.read_text())
    odd = [each for each in changed(row) if isinstance(each, dict)]
    source.write_text("".join(json.dumps(each) + "\n" for each in [row, *odd]))
    report = import_file(tmp_path, name, source).report
    assert report["rows_read"] == len(odd) + 1
    assert report["rows_taken"] + sum(report["left_out"].values()) == report["rows_read"]
    assert 1 < report["rows_taken"] < report["rows_read"]
    assert len(report["left_out"]) < 30, "reasons, not rows"
