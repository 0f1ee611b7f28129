"""YAML as users mean it: each key once; numbers are decimal, as in YAML 1.2.

YAML 1.1, which PyYAML reads, keeps the last of two equal keys, reads 010 as 8, 24:00:00 as 86400, 1e-4 as a text and
2026-01-31 as a date.
"""

import re
from typing import Any

import yaml

from mirage_ds.errors import ConfigError

_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))
_REPLACED = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")


class _RepeatedKeyError(ValueError):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's name and type)
        first: [(tag, form) for tag, form in forms if tag not in _REPLACED]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _RepeatedKeyError(f"{key.value:.80} stands twice (lines {lines[key.value]} and {line})")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load(text: str, what: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        what: such as `the recipe`, for messages.
        where: the file, or the override.

    Raises:
        ConfigError: it is not YAML, or a key stands twice.
    """
    try:
        return yaml.load(text, _Loader)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{error} ({where}); a key may stand once in {what}; keep one of them") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML ({where}): {error}; fix that line, or quote the value") from error
