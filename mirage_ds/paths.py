"""Paths that a user names, checked before torch and transformers are loaded: loading takes seconds, a check none.

`~` and `$VARIABLES` are expanded in every path of recipes, overrides and options: the shell leaves them alone in
`run.dir=~/runs/a` and in files.
"""

import errno
import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mirage_ds.errors import ConfigError, DataError, name_unwritable, reason_of

Location = Path | str
"""Of a folder: its path on a disk, or its URL on a server."""
Command = TypeVar("Command", bound=Callable[..., Any])
# A socket's path has at most 107 bytes (sun_path in unix(7)); multiprocessing puts its sockets into folders of its own.
SOCKET_NAME_BYTES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
MAX_TEMPORARY_BYTES = 107 - SOCKET_NAME_BYTES


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


def is_url(text: str) -> bool:
    """Whether it names a place on a server, and not a path."""
    return "://" in text


def to_location(text: str) -> Location:
    """A folder as a user names it, by its path or URL, expanded.

    Raises:
        ValueError: as `expand` does.
    """
    name = expand(text)
    return name if is_url(name) and not name.startswith("file://") else Path(name.removeprefix("file://"))


def local_folder(text: str) -> Path:
    """For a command's argument: a folder on a disk.

    Raises:
        ConfigError: it is a URL, which a Path would change.
    """
    path = text.removeprefix("file://")
    if is_url(path):
        raise ConfigError(
            f"a URL cannot be used here ({without_secrets(text)}); this command reads folders on a disk; copy the "
            "shards to one"
        )
    return Path(path)


def without_secrets(text: str) -> str:
    """A text without the user, password, query and fragment of the URLs in it.

    Rather too much is left out than a part of a secret that has an @, a / or a quote in it.
    """
    # What follows a colon and is no port is a password, though a / in it would end the host.
    without_user = re.sub(r"(\w://)(?:[^/\s]*@|[^/\s:]*:(?!\d*/)\S*@)", r"\1", text)
    return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", without_user)


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


def check_writable(folder: Path, key: str) -> None:
    """Refuses a folder in which nothing can be written, or that cannot be made.

    Args:
        key: of the recipe, for the message.

    Raises:
        DataError: with the system's reason.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    with name_unwritable(folder, f"set {key} to a folder where you may write"):
        if existing.is_symlink() and not existing.exists():
            raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: it is a link to {existing.readlink()}")
        with tempfile.TemporaryFile(dir=existing):
            pass


def check_file(path: Path, option: str, allowed: str) -> None:
    """Refuses a file that does not exist.

    Raises:
        DataError: it names the option.
    """
    _check(path, path.is_file, "file", option, allowed)


def check_folder(path: Path, option: str, allowed: str) -> None:
    """Refuses a folder that does not exist.

    Raises:
        DataError: it names the option.
    """
    _check(path, path.is_dir, "folder", option, allowed)


def _check(path: Path, is_wanted: Callable[[], bool], what: str, option: str, allowed: str) -> None:
    try:
        path.stat()
        problem = f"not a {what}"
    except OSError as error:  # Permission denied, Not a directory, File name too long
        problem = f"no such {what}" if isinstance(error, FileNotFoundError) else f"no {what}: {reason_of(error)}"
    else:
        if is_wanted():
            return
    raise DataError(f"{problem} ({option} {path}); expected {allowed}; correct the path")


def check_temporary_folder(without_workers: str = "data.num_workers=0") -> None:
    """Refuses a folder for temporary files in whose sockets data workers could not pass their batches on.

    Args:
        without_workers: what the user may give to need no sockets, for the message.

    Raises:
        ConfigError: its path is too long.
    """
    folder = tempfile.gettempdir()
    if len(folder.encode()) > MAX_TEMPORARY_BYTES:
        raise ConfigError(
            f"the path of the folder for temporary files has {len(folder.encode())} bytes (TMPDIR={folder:.40}...), "
            f"too many for the sockets of data workers; allowed: {MAX_TEMPORARY_BYTES}; set TMPDIR=/tmp, or "
            f"{without_workers}"
        )
