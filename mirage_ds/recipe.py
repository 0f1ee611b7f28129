"""Loads a YAML recipe with dotted overrides as a validated configuration.

config = load_config("recipe.yaml", ["train.lr=1e-4", "run.dir=runs/a"])
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mirage_ds import strict_yaml
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.paths import expand, without_secrets


def load_config(recipe: Path | str, overrides: list[str] | None = None) -> Config:
    """Reads a recipe, applies `section.key=value` overrides (values in YAML) and validates the result.

    Raises:
        ConfigError: the file, an override, a key or a value is wrong; the message names it, and what is allowed.
    """
    path = Path(recipe)
    tree = _read_yaml(path)
    for override in overrides or []:
        _apply_override(tree, override)
    # A section whose keys are all commented out has its defaults.
    sections = {name: {} if value is None and name in Config.model_fields else value for name, value in tree.items()}
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        problems = "\n".join(f"  - {_describe(details)}" for details in error.errors())
        raise ConfigError(
            f"the configuration is invalid ({path} and its overrides):\n{problems}\n"
            "correct each in the recipe, or with section.key=value on the command line"
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = Path(expand(str(path))).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the recipe cannot be read ({path}): {error}; expected a YAML file; "
            "give the path of one, for example one of launch/recipes/"
        ) from error
    tree = strict_yaml.load(text, "the recipe", str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"the recipe has no sections ({path}); allowed: {', '.join(Config.model_fields)}, each with its keys; "
            "start from one of launch/recipes/"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"an override cannot be parsed (on the command line: {override!r:.80}); expected section.key=value, "
            "for example train.lr=1e-4; correct it"
        )
    value = strict_yaml.load(text, "the value of an override", f"on the command line: {override!r:.80}")
    node = tree
    for part in parts[:-1]:
        child = node[part] = {} if node.get(part) is None else node[part]
        if not isinstance(child, dict):
            raise ConfigError(f"{key} cannot be set (on the command line): {part} is not a section; correct the key")
        node = child
    node[parts[-1]] = value


def _describe(details: ErrorDetails) -> str:
    """One problem as one line: the key, what is wrong, what is allowed."""
    location = [str(part) for part in details["loc"]]
    key = ".".join(location)
    if details["type"] == "extra_forbidden":
        allowed = _keys_at(location[:-1])
        return f"unknown key {key}: {hint(location[-1], allowed)}"
    if details["type"] == "missing":
        return f"{key} is missing: set it in the recipe or with {key}=VALUE"
    message = details["msg"].removeprefix("Value error, ")
    where = f"{key}: " if key else ""  # what two sections must not have together has no key
    return f"{where}{message}" + (
        "" if details["type"] == "value_error" else f" (got {without_secrets(repr(details['input'])):.80})"
    )


def hint(name: str, allowed: Iterable[str]) -> str:
    """The most similar of the allowed names, if any, and all of them."""
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed here: {', '.join(names)}"


def _keys_at(location: list[str]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = Config
    for part in location:
        found = section.model_fields[part].annotation
        # A section that may be unset is a union with None.
        section = next(kind for kind in (found, *get_args(found)) if hasattr(kind, "model_fields"))
    return list(section.model_fields)
