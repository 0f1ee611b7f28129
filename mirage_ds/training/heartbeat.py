"""Each rank's last step in a file of its own, to see from outside which rank of a hanging run is behind.

RUN/heartbeat/rank_N    {"step": 20, "host": "node7", "time": 1780000000.0}: that step's end; at most WRITE_S old

A thread writes it: steps may be short and the disk is shared by all ranks, and a rank that hangs no longer writes.
"""

import faulthandler
import json
import socket
import threading
import time
from pathlib import Path

from mirage_ds.housekeeping import housekeeping
from mirage_ds.training import early_end

FOLDER = "heartbeat"
WRITE_S = 10


class Heartbeat:
    """This rank's file. After too long without a step this rank also prints its stacks.

    As a context it is written from its beginning, every WRITE_S seconds if there was a step, and at its end.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_s: int, step: int) -> None:
        """
        Args:
            timeout_s: seconds without a beat after which Python's stacks are printed to stderr, once.
            step: steps that are done already.
        """
        self.file, self.timeout_s = run_dir / FOLDER / f"rank_{rank}", timeout_s
        self.host = socket.gethostname()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.live, name="heartbeat", daemon=True)
        self.beat(step)
        self.written = self.last

    def __enter__(self) -> "Heartbeat":
        self.write()
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.over.set()
        self.thread.join()
        self.write()
        if error is None:  # otherwise the process has yet to end, which the timer watches
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """Notes that `step` steps are done."""
        self.last = {"step": step, "host": self.host, "time": time.time()}
        if not early_end.is_asked():  # there is one timer, which then ends a process that does not answer
            faulthandler.dump_traceback_later(self.timeout_s)

    def live(self) -> None:
        while not self.over.wait(WRITE_S):
            if self.last is not self.written:
                self.write()

    def write(self) -> None:
        self.written, new = self.last, self.file.with_suffix(".new")
        with housekeeping(f"no heartbeat was written ({self.file})", "a rank that hangs will not be found by it"):
            self.file.parent.mkdir(exist_ok=True)
            new.write_text(json.dumps(self.written) + "\n")
            new.replace(self.file)
