"""Paths that a user names, checked before torch and transformers are loaded: loading takes seconds, a check none.

`~` and `$VARIABLES` are expanded in every path of recipes, overrides and options: the shell leaves them alone in
`run.dir=~/runs/a` and in files.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mirage_ds.errors import ConfigError, DataError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
Command = TypeVar("Command", bound=Callable[..., Any])


def expand(text: str) -> str:
    """A path, or the name of a model, with `~` and `$VARIABLES` replaced.

    Raises:
        ValueError: a variable is not set, or there is no such user.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if text.startswith("~") and expanded.startswith("~"):
        raise ValueError(f"{text.split('/')[0]:.80} is no home folder; name an existing user, or write ./~")
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{unset[0]:.80} is not set; set this variable, or write the folder out")
    return expanded


def expanded(*names: str) -> Callable[[Command], Command]:
    """For a command: expands its options that are paths, and those called `names`, which may be paths.

    Raises:
        ConfigError: as `expand` does; the message has the path.
    """

    def expand_option(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expand_option(name, item) for item in value]
        if not isinstance(value, Path) and (name not in names or value is None):
            return value
        try:
            return type(value)(expand(str(value)))
        except ValueError as error:
            raise ConfigError(f"the path cannot be used ({value!s:.80}): {error}") from error

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**options: Any) -> Any:
            return command(**{name: expand_option(name, value) for name, value in options.items()})

        return run  # type: ignore[return-value]

    return decorate


def check_file(path: Path, option: str, allowed: str) -> None:
    """Refuses a file that does not exist.

    Raises:
        DataError: it names the option.
    """
    if not path.is_file():
        raise DataError(f"no such file ({option} {path}); expected {allowed}; correct the path")


def check_folder(path: Path, option: str, allowed: str) -> None:
    """Refuses a folder that does not exist.

    Raises:
        DataError: it names the option.
    """
    if not path.is_dir():
        raise DataError(f"no such folder ({option} {path}); expected {allowed}; correct the path")


def check_model(name: str, where: str) -> None:
    """Refuses what is neither a folder nor the form of a hub id; whether the hub has that id, only the hub knows.

    Args:
        where: the option or key with its value, for the message.

    Raises:
        ConfigError: there is no such folder.
    """
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"the model folder does not exist ({where}); allowed: a Hugging Face folder (on a cluster: one that "
            "every node sees) or a hub id, OWNER/NAME; correct it"
        )
