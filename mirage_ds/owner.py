"""The owner of a run's folder, or of an output: one program at a time writes there, on any machine that sees the disk.

RUN/owner/N.json, .OUTPUT.owner/N.json    who it is, since when, last sign of life; the highest N is the current owner

An owner is a new file, which exactly one of several programs can make, also on NFS; nobody deletes the file of another
owner before having made its own, so nobody can mistake a living owner for the one before. The owner writes its file
again every BEAT_S seconds from a thread, whatever the program does, and deletes it at its end. Clocks of machines may
differ, so another machine does not compare times: it watches whether the file changes. Imports no torch.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mirage_ds.errors import OwnerError, name_unwritable
from mirage_ds.housekeeping import housekeeping

BEAT_S = 10  # between two signs of life
SILENT_S = 120  # without a sign of life, an owner on another machine is taken to have ended
POLL_S = 1
HIDDEN = "hidden"


class Owner:
    """This process's claim. Of a run only rank 0 has one."""

    def __init__(self, folder: Path, what: str) -> None:
        """Claims nothing yet, see `try_to_claim`.

        Args:
            folder: where the owners' files are; see `of_run` and `of_output`.
            what: what is owned, for messages.
        """
        self.folder, self.what = folder, what
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
        }

    def try_to_claim(self) -> bool:
        """Makes this process the owner, or returns False: ask again later, it is not known whether the other one lives.

        Raises:
            OwnerError: another program lives and is the owner.
            DataError: no file can be made there.
        """
        number, other = newest(self.folder)
        gone = None if other is None else self.why_gone(other)
        if other is not None and gone is None:
            if lives_here(other):
                raise OwnerError(refusal(self.what, other))
            if self.watched is None or self.watched[0].get("token") != other.get("token"):
                self.watched = (other, time.monotonic())
                self.say(f"waiting for a sign of life: {describe(other)} writes to {self.what}")
            elif self.watched[0] != other:
                raise OwnerError(refusal(self.what, other))
            if time.monotonic() < self.watched[1] + SILENT_S:
                return False
            gone = f"it has given no sign of life for {SILENT_S} s"
        if not self.make(number + 1, other):
            return False
        if other is not None:
            self.say(f"takes over {self.what} from {describe(other)}: {gone}")
        self.thread.start()
        return True

    def claim(self) -> None:
        """Makes this process the owner, after a wait if need be.

        Raises:
            OwnerError, DataError: see `try_to_claim`.
        """
        while not self.try_to_claim():
            time.sleep(POLL_S)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def why_gone(self, other: dict[str, Any]) -> str | None:
        """How it is known that an owner has ended; None if it may still live."""
        job = self.record["job"]
        if job is not None and job == other.get("job") and other.get("restart") != self.record["restart"]:
            return f"SLURM has ended that start of job {job}"
        if other.get("machine") == self.record["machine"] and not lives_here(other):
            return "that process has ended"
        return None

    def make(self, number: int, other: dict[str, Any] | None) -> bool:
        """Makes the file of the next owner after `other`; False if another program was faster."""
        with name_unwritable(self.folder, "name a folder where you may write"):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with (self.folder / f"{number}.json").open("x") as file:
                    file.write(json.dumps(self.record) + "\n")
            except (FileExistsError, FileNotFoundError):  # another owner came, or left with its folder
                return False
        self.number = number
        before = read(self.folder / f"{number - 1}.json")
        if newest(self.folder)[0] != number or (before or {}).get("token") != (other or {}).get("token"):
            # other owners have come and gone since this one looked, and one of them may have deleted the file
            (self.folder / f"{number}.json").unlink(missing_ok=True)
            return False
        for path in self.folder.glob("*.json"):
            if number_of(path) < number:
                with housekeeping(f"the file of an earlier owner was not deleted ({path})", "delete it by hand"):
                    path.unlink(missing_ok=True)
        return True

    def live(self) -> None:
        """Gives signs of life until the work is over, or another program has taken it over."""
        while not self.over.wait(BEAT_S):
            self.look()
            if self.lost.is_set():
                return
            self.record["seen"] = time.time()
            self.write()

    def look(self) -> None:
        """Notes whether another program has taken over, and may have ended since."""
        number, current = newest(self.folder)
        if number != self.number or (current or {}).get("token", self.record["token"]) != self.record["token"]:
            self.lost.set()

    def write(self) -> None:
        new = self.folder / f"{self.number}.new"
        with housekeeping(f"no sign of life was written ({self.folder})", "another program may take it over"):
            new.write_text(json.dumps(self.record) + "\n")
            new.replace(self.folder / f"{self.number}.json")

    def check(self, step: int | None = None) -> None:
        """After each step of a run, and before an output is put in its place.

        Raises:
            OwnerError: another program has taken over.
        """
        self.record["step"] = step
        if step is None or time.time() > self.record["seen"] + 2 * BEAT_S:  # it was asleep; no look at each step
            self.look()
        if self.lost.is_set():
            other = describe(newest(self.folder)[1] or {})
            raise OwnerError(
                f"another program has taken over {self.what}: {other}, as this one gave no sign of life for "
                f"{SILENT_S} s; allowed: one writer; let that one continue"
            )

    def release(self) -> None:
        """Others may write there again."""
        self.over.set()
        self.thread.join()
        self.look()
        if self.lost.is_set():
            return
        with housekeeping(f"the owner's file was not deleted ({self.folder})", "delete the folder by hand"):
            (self.folder / f"{self.number}.json").unlink()
        with suppress(OSError):  # the next owner may have come
            self.folder.rmdir()


def of_run(run_dir: Path) -> Owner:
    """A claim on a run's folder."""
    return Owner(run_dir / "owner", f"this run (run.dir={run_dir})")


def of_output(output: Path) -> Owner:
    """A claim on an output; its owners' files are beside it."""
    return Owner(output.parent / f".{output.name}.owner", f"this output ({output})")


def refuse_living(run_dir: Path) -> None:
    """Refuses a run whose owner lives on this machine; writes nothing. `Owner.try_to_claim` finds one elsewhere.

    Raises:
        OwnerError: who it is.
    """
    owner = of_run(run_dir)
    _, other = newest(owner.folder)
    if other is not None and lives_here(other):
        raise OwnerError(refusal(owner.what, other))


def newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Number and record of the current owner; (0, None) without one."""
    path = max(folder.glob("*.json"), key=number_of, default=None)
    return (0, None) if path is None else (number_of(path), read(path) or {})


def read(path: Path) -> dict[str, Any] | None:
    """An owner's record; None if it cannot be read: it is gone, is being written, or its disk was full."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def number_of(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def refusal(what: str, other: dict[str, Any]) -> str:
    return (
        f"another program writes to {what}: {describe(other)}; allowed: one writer; wait for it, end it, or name "
        "another folder"
    )


def describe(record: dict[str, Any]) -> str:
    """Who, where, since when, last sign of life."""
    if "since" not in record:
        return "an owner whose file cannot be read"
    job = f", job {record['job']}" if record.get("job") else ""
    step = "" if record.get("step") is None else f", step {record['step']}"
    since, seen = (time.strftime("%F %T", time.localtime(record[key])) for key in ("since", "seen"))
    return f"process {record['pid']} on {record['host']}{job}, since {since}, last sign of life {seen}{step}"


def lives_here(record: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that runs now."""
    same = record.get("machine") == this_machine()
    return same and record.get("process") is not None and process_start(record["pid"]) in (record["process"], HIDDEN)


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none, or it has ended and waits to be reaped.

    HIDDEN for a process of another user where /proc shows only one's own (its option hidepid).
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return HIDDEN
        except ProcessLookupError:
            pass
        return None
    return None if state in "ZX" else fields[18]


def this_machine() -> str:
    """The same for processes that see each other's numbers: one boot, one namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
