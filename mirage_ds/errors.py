"""What a user can cause and fix. Such an error is printed once, without a traceback, and the exit code is 2.

Every message has four parts: what is wrong, where, what is allowed, what to do.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class MirageError(Exception):
    """Base of every error that a user can fix; anything else is a bug and keeps its traceback."""

    exit_code = 2


class ConfigError(MirageError):
    """A recipe, an override, a DeepSpeed JSON or a model folder that cannot be used as it is."""


class DataError(MirageError):
    """A row, an image, a shard or a manifest that cannot be read or does not fit together."""


class StallError(DataError):
    """Data that do not come in time. Another start may get them, so SLURM jobs start again."""

    exit_code = 1


class WrongShardError(DataError):
    """A file of other bytes than its manifest says: its samples cannot be told apart, so none is skipped for it."""


class CheckpointError(MirageError):
    """A checkpoint that is missing, incomplete, or belongs to another model or run."""


class TrainingError(MirageError):
    """A run that cannot continue, which all ranks know: losses that are not finite, a sample that cannot be used."""


class EvaluationError(TrainingError):
    """An evaluation in training that cannot be made; training itself could continue."""


class OwnerError(MirageError):
    """A run's folder that another start writes to."""


class DeviceError(MirageError):
    """A rank without a GPU of its own; the other ranks of its node may have theirs.

    A node may have lost one. Another start may get other nodes, so SLURM jobs start again.
    """

    exit_code = 1


class DiskFullError(MirageError):
    """A disk, or a user's quota on it, with no room for what was to be written."""


class MemoryFullError(MirageError):
    """A GPU or a host with too little memory for the run's micro-batches."""


LOCAL_RANK_NAMES = ("MIRAGE_LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID")
"""Variables with a rank's number on its node; the first that is set counts. `zero3/distributed.py` sets the first of
them where LOCAL_RANK has to be something else."""

# What libraries raise while they read a user's files that are not as they expect.
MALFORMED = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def reason_of(error: Exception) -> str:
    """The system's own words, cut to 80 characters, without the path, which the message has."""
    return f"{getattr(error, 'strerror', None) or error!s:.80}"


@contextmanager
def name_full_disk(folder: Path, remedy: str) -> Iterator[None]:
    """Says where the disk is full, and what to do. Other errors, and one that says so already, pass unchanged.

    Raises:
        DiskFullError: the system had no room for something written inside.
    """
    reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)]
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers have the system's words but not its code, and tokenizers' error has no type.
        if isinstance(error, MirageError) or not any(reason in str(error) for reason in reasons):
            raise
        where = getattr(error, "filename", None) or folder
        raise DiskFullError(f"the disk is full ({where}): {error}; what is written needs room; {remedy}") from error


@contextmanager
def name_unwritable(path: Path, remedy: str) -> Iterator[None]:
    """Says what cannot be written, and what to do. A full disk is left to `name_full_disk`.

    Raises:
        DataError: the system refused to write something inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the output cannot be written: {error.strerror} ({path}); expected a place where you may write; {remedy}"
        ) from error


def leave(error: MirageError, *, every_rank: bool = False) -> NoReturn:
    """Prints the message and ends this process with the error's exit code.

    Other ranks may wait for this one in a collective. It does not wait for them: the launcher ends them.

    Args:
        every_rank: this rank may be the only one with the error, so it prints. Otherwise the first rank of each node
            prints for all ranks there: a folder may be missing on one node only.
    """
    if every_rank or is_first_of_node():
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(error.exit_code)


def is_first_of_node() -> bool:
    """Whether this process is its node's first rank, or no rank. Known before the ranks join each other."""
    return next((os.environ[name] for name in LOCAL_RANK_NAMES if os.environ.get(name)), "0") == "0"


def run(app: Callable[[], object]) -> None:
    """Runs a command line: a user's mistake is one message and exit code 2; a bug keeps its traceback."""
    try:
        app()
    except MirageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
