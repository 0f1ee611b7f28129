"""Whether a run must save and end before its last step: a signal to any rank, or the end of its SLURM job.

SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 -> a flag -> all ranks agree after the step -> checkpoint -> RUN/preempted -> code 0

Imports nothing slow: `listen` comes first, as a signal during the start must not end the run unsaved.
"""

import faulthandler
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from mirage_ds.programs import ask

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MARK_NAME = "preempted"
START_GRACE_S = 600  # the start: imports, the weights, the first step
STEP_GRACE_S = 60  # beyond three times the longest step so far, validation and checkpoints included

_received: list[tuple[int, float]] = []  # signals, each with its time on the monotonic clock


def listen(grace_s: float | None = START_GRACE_S) -> None:
    """From now on such a signal is remembered instead of ending this process; a second one changes nothing.

    If no step answers it within `grace_s`, this process prints where it is and ends, unsaved, with exit code 1; without
    `grace_s` it waits for an answer. SIGHUP stays ignored under nohup, whose purpose that is.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, partial(_remember, grace_s))


def only_remember() -> None:
    """From now on such a signal ends nothing by itself, however long the last save takes."""
    listen(None)
    faulthandler.cancel_dump_traceback_later()


def ignore() -> None:
    """From now on such a signal does nothing: the run is saved, and the interpreter takes a while to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.cancel_dump_traceback_later()


def is_asked() -> bool:
    """Whether such a signal has come."""
    return bool(_received)


def _remember(grace_s: float | None, number: int, frame: FrameType | None) -> None:
    if not _received and grace_s is not None:
        faulthandler.dump_traceback_later(grace_s, exit=True)
    _received.append((number, time.monotonic()))


def is_asked_within(seconds: float) -> bool:
    """Whether such a signal came within the last so many seconds, or comes within the next ones."""
    now_s = time.monotonic()
    while time.monotonic() < now_s + seconds:
        if any(received_s > now_s - seconds for _, received_s in _received):
            return True
        time.sleep(0.05)
    return False


class EarlyEnd:
    """Why this rank must end, or None. Call it once per step, and let all ranks agree.

    Each call also answers a signal, which then no longer ends the process by itself. Between two steps, where the run
    may validate and save, a signal may wait for its answer as long as a collective; in a step, as `begin_step` says.
    """

    def __init__(self, end_s: float | None, margin_s: float, grace_s: float = START_GRACE_S) -> None:
        """
        Args:
            end_s: when the job ends, in seconds since the epoch, if it does.
            margin_s: seconds before that which are kept for writing a checkpoint.
            grace_s: longest time from a signal to its answer.
        """
        self.end_s, self.margin_s, self.grace_s = end_s, margin_s, grace_s
        self.asked_s, self.longest_s = time.time(), 0.0

    def __call__(self) -> str | None:
        """The reason to end after this step, or None. The next step is assumed to take as long as this one."""
        now_s = time.time()
        step_s, self.asked_s = now_s - self.asked_s, now_s
        self.longest_s = max(self.longest_s, step_s)
        faulthandler.cancel_dump_traceback_later()
        if _received:
            return signal.Signals(_received[0][0]).name
        if self.end_s is not None and now_s + step_s + self.margin_s > self.end_s:
            return f"the job ends in {max(0, self.end_s - now_s):.0f} s"
        listen(self.grace_s)
        return None

    def has_time(self, seconds: float) -> bool:
        """Whether so many seconds, and a checkpoint, fit before the job's end, as far as this rank knows it."""
        return self.end_s is None or time.time() + seconds + self.margin_s <= self.end_s

    def begin_step(self) -> None:
        """From now on a step answers signals: in three times the longest so far, and a minute."""
        listen(min(self.grace_s, STEP_GRACE_S + 3 * self.longest_s))


def job_end_s(say: Callable[[str], None]) -> float | None:
    """When this SLURM job reaches its time limit, in seconds since the epoch; None outside a job or without a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    try:
        result = ask("scontrol", "--oneliner", "show", "job", job, timeout_s=60)
        fields = dict(field.partition("=")[::2] for field in result.stdout.split())
        end = fields.get("EndTime", "Unknown")
        return None if end == "Unknown" else time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S"))
    # In a container there may be no scontrol; and another version may write the time in another way.
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        say(f"the job's time limit is unknown ({error}): the run saves in time only if it gets a signal")
        return None


def mark(run_dir: Path, step: int) -> None:
    """Marks the run as saved but not finished."""
    (run_dir / MARK_NAME).write_text(json.dumps({"step": step}) + "\n")


def unmark(run_dir: Path) -> None:
    """A run that starts is no longer preempted."""
    (run_dir / MARK_NAME).unlink(missing_ok=True)
