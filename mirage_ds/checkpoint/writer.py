"""The process of a rank that writes its files while training continues.

rank: copies the state to host memory (host_copy.py), sends names and pickles -> writer: writes the files (written.py),
sends their entries in files.json, or why it could not.

It is a fork of the rank, made at the very start of the run: it has all imports already, and the rank has not yet
started threads, a GPU or connections, which a fork must not share.
"""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from mirage_ds.checkpoint.host_copy import HostCopy
from mirage_ds.checkpoint.host_memory import shortage
from mirage_ds.checkpoint.written import Written, write_states
from mirage_ds.zero3 import distributed

NAME = b"mirage-writer"  # as ps shows it
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
# SLURM signals every process of a step, a terminal every process of its group; the rank decides what is done.
IGNORED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT)


class Writer:
    """Writes one save at a time. The process ends with this one, however this one ends."""

    def __init__(self) -> None:
        self.copy = HostCopy()
        self.connection, others = multiprocessing.Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # until the fork ignores them
        rank = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            _run(self.copy, others, rank)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        others.close()

    def begin(self, folder: Path, states: Mapping[str, Any], *, read_back: bool) -> None:
        """Copies the states, which may change as soon as it returns, and lets the process write them."""
        pickles = self.copy.take(states)
        with suppress(OSError):  # the process has ended; `wait` says how
            self.connection.send((folder, pickles, read_back))

    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self.connection.poll()

    def wait(self) -> Written:
        """What became of the files that `begin` named."""
        try:
            written: Written = self.connection.recv()
        except (EOFError, OSError):
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"  # memory out: SIGKILL
            return Written({}, f"the process that writes its files (pid {self.pid}) was ended {how}")
        return written

    def end(self) -> None:
        """Ends the process and frees the host memory; for a writer that has nothing to write."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.connection.close()
        self.copy.release()
        os.close(self.copy.descriptor)


def with_memory(writer: Writer, size: int) -> Writer | None:
    """Takes the memory for the copies, so many bytes on this rank; a collective call of all ranks.

    Returns:
        None if a rank cannot have its memory, after one line that says why; then the writers have ended.
    """
    lacking = shortage(size)
    if lacking is None:
        error = None
        try:
            writer.copy.reserve(size)
        except (OSError, RuntimeError) as refused:
            error = f"rank {distributed.rank()} cannot take {size / 1e9:.1f} GB of host memory: {refused}"
        lacking = next(filter(None, distributed.gather(error)), None)
    if lacking is None:
        return writer
    writer.end()
    if distributed.is_main():
        print(f"Training waits while a checkpoint is written, as with checkpoint.mode=blocking: {lacking}", flush=True)
    return None


def _run(copy: HostCopy, connection: Connection, rank: int) -> NoReturn:
    """The process, from fork to end; never returns into the rank's code."""
    code = 1
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NAME, NAME)
        # A writer that survives its rank would write into a folder that the run's next start uses.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        while os.getppid() == rank:  # it may have ended before that
            folder, pickles, read_back = connection.recv()
            connection.send(write_states(folder, copy.read(pickles), read_back=read_back))
        code = 0
    except (EOFError, ConnectionError):  # the rank has ended, a moment before the system ends this process
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)
