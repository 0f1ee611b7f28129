"""An output folder that is either complete or does not exist. Whether it can be is found before the work."""

import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from mirage_ds.errors import DataError, DiskFullError, name_full_disk, name_unwritable
from mirage_ds.owner import of_output


def check_output(output: Path) -> Path:
    """Refuses an output that a new folder cannot replace; returns it with symbolic links resolved.

    Raises:
        DataError: it exists and is not an empty folder of this user, or is a mount point or the current folder, or no
            folder can be made there.
    """
    target = output.resolve()
    with name_unwritable(output, "name another"):
        if target.exists():
            _check_replaceable(target, output)
        existing = next(folder for folder in target.parents if folder.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            probe = existing / f".{secrets.token_hex(8)}"
            probe.mkdir()  # for the system's reason: permission, read-only, ...
            probe.rmdir()
    return target


def _check_replaceable(target: Path, output: Path) -> None:
    if not target.is_dir() or any(target.iterdir()):
        raise DataError(
            f"the output already exists ({output}); expected a new or empty folder; name another or remove it"
        )
    problem = None
    if os.path.ismount(target):
        problem = "is a mount point"
    elif target == Path.cwd():
        problem = "is the current folder"
    elif target.stat().st_uid != os.geteuid():
        problem = "belongs to another user"
    if problem:
        raise DataError(
            f"the output {problem} ({output}), which a complete folder cannot replace; allowed: a new or empty folder; "
            f"name a folder in it, for example {output / 'new'}"
        )


@contextmanager
def new_folder(output: Path, *, needs_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `output` and renames it to `output` at the end, or deletes it on an error.

    SIGTERM and SIGHUP are such errors. Of two programs with one output, the second is refused.

    Args:
        needs_bytes: what will be written at least, if it is known.

    Raises:
        DataError: see `check_output`.
        OwnerError: another program writes this output.
        DiskFullError: there is no space for it.
    """
    target = check_output(output)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    remedy = f"nothing of {output.name} was kept; free some space, or write it to another disk"
    with ExitStack() as until_the_end:
        until_the_end.enter_context(signals_as_errors())
        with name_unwritable(output, "name another"):
            target.parent.mkdir(parents=True, exist_ok=True)
            owner = of_output(target)
            owner.claim()
            check_output(output)  # again: the owner before may have written it since
            until_the_end.callback(owner.release)
            _name_leftovers(target)
            _check_room(target, needs_bytes)
            until_the_end.callback(shutil.rmtree, temporary, ignore_errors=True)  # it is gone after a success
            temporary.mkdir()
            if target.exists():
                temporary.rename(target)  # what would fail at the end fails now; an empty folder for an empty folder
                temporary.mkdir()
        with name_full_disk(target.parent, remedy):
            yield temporary
        owner.check()
        _move(temporary, target)


def _move(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        kept = temporary.with_suffix(".complete")
        temporary.rename(kept)
        raise DataError(
            f"the output is complete but cannot be moved to its place: {error.strerror} ({target}); expected a new or "
            f"empty folder; it is kept in {kept}: move it from there"
        ) from error


def _check_room(target: Path, needs_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needs_bytes:
        raise DiskFullError(
            f"no room for the output ({target}): it needs {needs_bytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
            "free; nothing was written; free some space, or name a folder on another disk"
        )


def _name_leftovers(target: Path) -> None:
    """Says what programs have left that were killed: the owner of this output is this one, so nothing else lives."""
    temporary = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.tmp")
    for path in sorted(path for path in target.parent.iterdir() if temporary.fullmatch(path.name)):
        print(f"left by a program that was killed: {path}; remove it with rm -r '{path}'", file=sys.stderr)


@contextmanager
def signals_as_errors() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as Ctrl-C does, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
