"""Writes docs/configuration.md from mirage_ds/config.py: `make docs`. A test fails when the page is stale.

Docstrings are read from the source: pydantic could (`use_attribute_docstrings`), but would do so in every command.
"""

import ast
import inspect
import textwrap
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Strict, WrapValidator
from pydantic.fields import FieldInfo

from mirage_ds.config import Config
from mirage_ds.config_values import LARGEST, Section, WeightedShards

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = r"""
# Configuration

Every key of a recipe: which values it may have, its default, and what it does. This page is generated from
[`mirage_ds/config.py`](../mirage_ds/config.py), [`config_data.py`](../mirage_ds/config_data.py),
[`config_lora.py`](../mirage_ds/config_lora.py) and [`config_train.py`](../mirage_ds/config_train.py) by `make docs`;
change the docstrings there, not this page.

A recipe is a YAML file with the sections below; [`launch/recipes/`](../launch/recipes) has some to start from. It is
checked before anything starts: an unknown key or a value that is not allowed is an error that names the key. Every
command that takes a recipe also takes `section.key=value`, which overrides the recipe. Values are YAML: `null` unsets
a key, and lists need quotes in the shell.

```bash
mirage-launch slurm launch/recipes/tiny-stage1.yaml --nodes 1 --ranks-per-node 2 --dry-run \
    train.lr=1e-4 'train.betas=[0.9, 0.95]' data.max_length=null
```

What DeepSpeed alone decides (bucket sizes, thresholds, offload, communication) is not in the recipe but in a DeepSpeed
JSON, which `distributed.deepspeed_config` names: [`zero3.json`](../ds_configs/zero3.json),
[`zero3_offload.json`](../ds_configs/zero3_offload.json), [`zero3_tiny.json`](../ds_configs/zero3_tiny.json) (of the
demo), or a file of your own. A number that the recipe sets is `"auto"` there; a file that contradicts the recipe is
refused.

A section without keys has its defaults. A key that stands twice is refused. Numbers are decimal and finite; integers
are at most 2147483647. In paths, `~` and `$VARIABLES` are expanded.

"Required" keys have no default. Paths are relative to the folder in which the command runs. `RUN` is `run.dir`.
"""
TYPES = {Path: "path", str: "text", int: "integer", float: "number", bool: "`true` or `false`"}


def page(config: type[Section] = Config) -> str:
    """The page in Markdown.

    Raises:
        ValueError: a key has no docstring, or a type or limit that this page has no words for.
    """
    lines = [INTRODUCTION.lstrip()]
    for name, field in config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        lines += [f"## {name}", "", section.__doc__ or "", ""]
        lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [*_rows(name, section), ""]
    return "\n".join(lines)


def _rows(name: str, section: type[Section]) -> list[str]:
    """The rows of a section's keys; those of a section within it follow the key that has it."""
    lines, meanings = [], _meanings(section)
    for key, setting in section.model_fields.items():
        if key not in meanings:
            raise ValueError(f"{name}.{key} has no docstring in {section.__module__}; write one below the key")
        within = [each for each in get_args(setting.annotation) if isinstance(each, type) and issubclass(each, Section)]
        values = "section" if within else _values(setting.annotation, setting.metadata)
        default = "required" if setting.is_required() else _default(setting.default)
        lines.append(f"| `{name}.{key}` | {values} | {default} | {meanings[key]} |")
        for each in within:
            lines += _rows(f"{name}.{key}", each)
    return lines


def _meanings(section: type[Section]) -> dict[str, str]:
    """The docstring below each key of a section, in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    meanings = {}
    for key, text in pairwise(tree.body):
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            meanings[ast.unparse(key.target)] = " ".join(str(text.value.value).split()).replace("|", r"\|")
    return meanings


def _values(annotation: Any, limits: Any = ()) -> str:
    """A type and its limits in words: `PositiveInt | None` -> integer > 0. The default shows what may be unset."""
    if annotation == tuple[WeightedShards, ...]:
        return "list of paths and of `{path, weight}`"
    if get_origin(annotation) is Annotated:
        kind, *more = get_args(annotation)
        return _values(kind, [*limits, *more])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return " or ".join(_values(kind, limits) for kind in kinds)
    if get_origin(annotation) is Literal:
        return ", ".join(_default(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple and get_args(annotation)[1:] == (...,):
        return f"list of {_values(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join(_values(kind) for kind in get_args(annotation))}]"
    if annotation not in TYPES:
        raise ValueError(f"no words for the type {annotation}; add them to docs/configuration.py")
    words = [words for limit in limits for words in _limit(limit)]
    return f"{TYPES[annotation]} {' and '.join(words)}".strip()


def _limit(limit: Any) -> list[str]:
    """The limits in an annotation; the largest integer is in the introduction."""
    if isinstance(limit, FieldInfo):
        return [words for part in limit.metadata for words in _limit(part)]
    if isinstance(limit, (AfterValidator, BeforeValidator, Strict, WrapValidator)) or limit == Le(LARGEST):
        return []
    if isinstance(limit, Gt):
        return [f"> {limit.gt}"]
    if isinstance(limit, Ge):
        return [f">= {limit.ge}"]
    if isinstance(limit, Lt):
        return [f"< {limit.lt}"]
    if isinstance(limit, Le):
        return [f"<= {limit.le}"]
    raise ValueError(f"no words for the limit {limit}; add them to docs/configuration.py")


def _default(value: Any) -> str:
    """A default as a recipe would have it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`".replace("e-0", "e-")
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
