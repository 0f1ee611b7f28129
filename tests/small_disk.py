"""A disk that is full: a small tmpfs in a mount namespace of its own, and starts that see it.

A process that sleeps keeps the namespace; the disk disappears with it.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import launching

import data_tools.cli
import mirage_ds.cli

NAMESPACE = ("unshare", "--map-root-user", "--mount")
MAINS = dict.fromkeys(("build", "make-vsp"), data_tools.cli.main)
MAINS |= dict.fromkeys(("init", "export", "evaluate"), mirage_ds.cli.main)


def may_mount() -> bool:
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class SmallDisk:
    """A tmpfs of so many bytes at `place`, inside the `with` block, for processes that call `enter` with `pid`."""

    def __init__(self, place: Path, size_bytes: int) -> None:
        script = f"mount -t tmpfs -o size={size_bytes} tmpfs {place} && echo mounted && exec cat"
        self.keeper = subprocess.Popen(
            [*NAMESPACE, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.keeper.stdout.readline() == "mounted\n"
        self.pid = self.keeper.pid
        self.outside = Path(f"/proc/{self.pid}/root{place}")
        """The same disk, for other processes."""

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.keeper.communicate()  # the end of its input ends it

    def fill(self, spare_bytes: int) -> None:
        (self.outside / "filler").write_bytes(bytes(max(0, shutil.disk_usage(self.outside).free - spare_bytes)))

    def empty(self) -> None:
        """Undoes `fill`."""
        (self.outside / "filler").unlink(missing_ok=True)


def enter(pid: int) -> None:
    """Moves this process into the namespaces of another one. os.setns needs Python 3.12."""
    here, libc = Path.cwd(), ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        with Path(f"/proc/{pid}/ns/{kind}").open() as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"setns: {kind}")
    os.chdir(here)


class Usage(NamedTuple):
    free: int


def run(pid: int, hides_shortage: bool, *arguments: str) -> None:
    """A command, or the trainer, on the disk; `hides_shortage`: it sees free space that does not exist."""
    enter(pid)
    if hides_shortage:
        shutil.disk_usage = lambda path: Usage(free=2**40)
    if arguments[0] in MAINS:
        sys.argv = ["command", *arguments]
        MAINS[arguments[0]]()
    else:
        launching.train(*arguments)
