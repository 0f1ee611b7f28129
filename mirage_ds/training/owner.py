"""The owner of a run's folder: one start at a time writes there, on any machine that sees the folder.

RUN/owner/N.json    the N-th owner: host, process, since when, last sign of life; the highest N is the current one

An owner is a new file, which exactly one of several starts can make, also on NFS; nobody deletes the file of another
owner before having made its own, so no start can mistake a living owner for the one before. The owner writes its file
again every BEAT_S seconds from a thread, whatever the training does. Clocks of machines may differ, so another machine
does not compare times: it watches whether the file changes. Imports no torch.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mirage_ds.errors import OwnerError, name_unwritable
from mirage_ds.housekeeping import housekeeping

FOLDER = "owner"
BEAT_S = 10  # between two signs of life
SILENT_S = 120  # without a sign of life, an owner on another machine is taken to have ended
POLL_S = 1


class Owner:
    """This process's claim on a run's folder. Only rank 0 has one."""

    def __init__(self, run_dir: Path) -> None:
        """Claims nothing yet, see `try_to_claim`."""
        self.run_dir, self.folder = run_dir, run_dir / FOLDER
        self.number = 0
        self.watched: tuple[dict[str, Any], float] | None = None  # an owner elsewhere, and since when it is unchanged
        self.lost = threading.Event()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.live, name="sign of life", daemon=True)
        self.record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": process_start(os.getpid()),
            "machine": this_machine(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": uuid.uuid4().hex,
            "since": time.time(),
            "seen": time.time(),
            "step": None,
            "ended": False,
        }

    def try_to_claim(self) -> bool:
        """Makes this process the owner, or returns False: ask again later, it is not known whether the other one lives.

        Raises:
            OwnerError: another start lives and is the owner.
        """
        number, other = newest(self.folder)
        gone = None if other is None else self.why_gone(other)
        if other is not None and gone is None:
            if lives_here(other):
                raise OwnerError(refusal(self.run_dir, other))
            if self.watched is None or self.watched[0].get("token") != other.get("token"):
                self.watched = (other, time.monotonic())
                print(f"waiting for a sign of life: {describe(other)} writes to {self.run_dir}", flush=True)
            elif self.watched[0] != other:
                raise OwnerError(refusal(self.run_dir, other))
            if time.monotonic() < self.watched[1] + SILENT_S:
                return False
            gone = f"it has given no sign of life for {SILENT_S} s"
        if not self.make(number + 1):
            return False
        if gone:
            print(f"takes {self.run_dir} over from {describe(other or {})}: {gone}", flush=True)
        self.thread.start()
        return True

    def why_gone(self, other: dict[str, Any]) -> str | None:
        """Why an owner no longer needs the folder; "" if it said so itself; None if it may still live."""
        if other.get("ended"):
            return ""
        job = self.record["job"]
        if job is not None and job == other.get("job") and other.get("restart") != self.record["restart"]:
            return f"SLURM has ended that start of job {job}"
        if other.get("machine") == self.record["machine"] and not lives_here(other):
            return "that process has ended"
        return None

    def make(self, number: int) -> bool:
        """Makes the file of the next owner; False if another start was faster."""
        with name_unwritable(self.folder, "set run.dir to a folder where you may write"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with (self.folder / f"{number}.json").open("x") as file:
                    file.write(json.dumps(self.record) + "\n")
            except FileExistsError:
                return False
        self.number = number
        if newest(self.folder)[0] != number:  # several owners have come and gone since this one looked
            (self.folder / f"{number}.json").unlink()
            return False
        for path in self.folder.glob("*.json"):
            if number_of(path) < number:
                with housekeeping(f"the file of an earlier owner was not deleted ({path})", "delete it by hand"):
                    path.unlink(missing_ok=True)
        return True

    def live(self) -> None:
        """Gives signs of life until the run is over, or another start has taken it over."""
        while not self.over.wait(BEAT_S):
            if newest(self.folder)[0] > self.number:
                self.lost.set()
                return
            self.record["seen"] = time.time()
            self.write()

    def write(self) -> None:
        new = self.folder / f"{self.number}.new"
        with housekeeping(f"no sign of life was written ({self.folder})", "another start may take the run over"):
            new.write_text(json.dumps(self.record) + "\n")
            new.replace(self.folder / f"{self.number}.json")

    def beat(self, step: int) -> None:
        """After each step.

        Raises:
            OwnerError: another start has taken the folder over.
        """
        self.record["step"] = step
        if self.lost.is_set():
            other = describe(newest(self.folder)[1] or {})
            raise OwnerError(
                f"another start has taken this run over (run.dir={self.run_dir}): {other}, as this one gave no sign of "
                f"life for {SILENT_S} s; a run has one writer; let that one continue"
            )

    def release(self) -> None:
        """The folder is free again; after a start that wrote nothing else there, as it was before."""
        self.over.set()
        self.thread.join()
        if self.lost.is_set():
            return
        self.record["ended"] = True
        if self.number == 1 and {path.name for path in self.run_dir.iterdir()} == {FOLDER}:
            with suppress(OSError):
                (self.folder / "1.json").unlink()
                self.folder.rmdir()
                self.run_dir.rmdir()
        else:
            self.write()


def refuse_living(run_dir: Path) -> None:
    """Refuses a run whose owner lives on this machine; writes nothing. An owner elsewhere is asked by `own`.

    Raises:
        OwnerError: who it is.
    """
    _, other = newest(run_dir / FOLDER)
    if other is not None and not other.get("ended") and lives_here(other):
        raise OwnerError(refusal(run_dir, other))


def newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Number and record of the current owner; (0, None) before the first. A record that cannot be read is empty."""
    path = max(folder.glob("*.json"), key=number_of, default=None)
    if path is None:
        return 0, None
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):  # it is being written, or its disk was full
        record = {}
    return number_of(path), record if isinstance(record, dict) else {}


def number_of(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def refusal(run_dir: Path, other: dict[str, Any]) -> str:
    return (
        f"another start writes to this run (run.dir={run_dir}): {describe(other)}; a run has one writer; wait for it, "
        "end it, or set run.dir to another folder"
    )


def describe(record: dict[str, Any]) -> str:
    """Who, where, since when, last sign of life."""
    if "since" not in record:
        return "an owner whose file cannot be read"
    job = f", job {record['job']}" if record.get("job") else ""
    step = "no step yet" if record.get("step") is None else f"step {record['step']}"
    since, seen = (time.strftime("%F %T", time.localtime(record[key])) for key in ("since", "seen"))
    return f"process {record['pid']} on {record['host']}{job}, since {since}, last sign of life {seen}, {step}"


def lives_here(record: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that runs now."""
    same = record.get("machine") == this_machine()
    return same and record.get("process") is not None and process_start(record["pid"]) == record["process"]


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none, or it has ended and waits to be reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def this_machine() -> str:
    """The same for processes that see each other's numbers: one boot, one namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
