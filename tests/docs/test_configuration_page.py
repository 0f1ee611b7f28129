"""docs/configuration.md is what `make docs` makes of mirage_ds/config.py now, and every key has a meaning."""

import re

import configuration
import pytest
from pydantic import Field

from mirage_ds.config import Config
from mirage_ds.config_values import Section


def test_the_page_is_not_stale() -> None:
    assert configuration.page() == configuration.PAGE.read_text(), "run `make docs`, and commit docs/configuration.md"


def test_the_page_has_every_key_with_its_meaning() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (.+) \| (.+) \| (.{10,}) \|$", configuration.PAGE.read_text(), re.MULTILINE)
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    assert [row[0] for row in rows] == [f"{name}.{key}" for name, keys in sections.items() for key in keys]


def page_of(section: type[Section]) -> str:
    class Example(Section):
        part: section

    return configuration.page(Example)


def test_types_limits_and_defaults_in_words() -> None:
    class Part(Section):
        """A part."""

        a: float | None = Field(default=None, gt=0)
        """In two
        lines, a|b."""
        b: tuple[int, int] = (1, 2)
        """Two."""
        c: bool = True
        """One of
        two."""
        d: float = Field(default=1e-8, ge=0)
        """Small."""
        e: str
        """Text."""

    assert page_of(Part).splitlines()[-5:] == [
        "| `part.a` | number > 0 | unset | In two lines, a\\|b. |",
        "| `part.b` | [integer, integer] | `[1, 2]` | Two. |",
        "| `part.c` | `true` or `false` | `true` | One of two. |",
        "| `part.d` | number >= 0 | `1e-8` | Small. |",
        "| `part.e` | text | required | Text. |",
    ]


def test_a_key_without_a_meaning_is_refused() -> None:
    class Part(Section):
        """A part."""

        a: int = 1
        b: int = 2
        """The second."""

    with pytest.raises(ValueError, match=r"part\.a has no docstring"):
        page_of(Part)


def test_a_type_without_words_is_refused() -> None:
    class Part(Section):
        """A part."""

        a: frozenset[int] = frozenset()
        """Many."""

    with pytest.raises(ValueError, match="no words for the type"):
        page_of(Part)
