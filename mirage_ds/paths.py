"""Paths that a user names, checked before torch and transformers are loaded: loading takes seconds, a check none."""

import re
import tempfile
from pathlib import Path

from mirage_ds.errors import ConfigError, DataError

# A socket's path has at most 107 bytes (sun_path in unix(7)); multiprocessing puts its sockets into folders of its own.
SOCKET_NAME_BYTES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
MAX_TEMPORARY_BYTES = 107 - SOCKET_NAME_BYTES
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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


def check_temporary_folder() -> None:
    """Refuses a folder for temporary files in whose sockets data workers could not pass their batches on.

    Raises:
        ConfigError: its path is too long.
    """
    folder = tempfile.gettempdir()
    if len(folder.encode()) > MAX_TEMPORARY_BYTES:
        raise ConfigError(
            f"the path of the folder for temporary files has {len(folder.encode())} bytes (TMPDIR={folder:.40}...), "
            f"too many for the sockets of data workers; allowed: {MAX_TEMPORARY_BYTES}; set TMPDIR=/tmp, or "
            "data.num_workers=0"
        )
