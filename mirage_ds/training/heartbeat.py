"""Each rank's last step in a file of its own, to see from outside which rank of a hanging run is behind.

RUN/heartbeat/rank_N    {"step": 20, "host": "node7", "time": 1780000000.0}, rewritten after each step
"""

import faulthandler
import json
import socket
import time
from pathlib import Path

from mirage_ds.housekeeping import housekeeping
from mirage_ds.training import early_end

FOLDER = "heartbeat"


class Heartbeat:
    """This rank's file. After too long without a step this rank also prints its stacks."""

    def __init__(self, run_dir: Path, rank: int, timeout_s: int) -> None:
        """
        Args:
            timeout_s: seconds without a beat after which Python's stacks are printed to stderr, once.
        """
        self.file, self.timeout_s = run_dir / FOLDER / f"rank_{rank}", timeout_s
        self.host = socket.gethostname()

    def beat(self, step: int) -> None:
        """Writes that `step` steps are done."""
        new = self.file.with_suffix(".new")
        with housekeeping(f"no heartbeat was written ({self.file})", "a rank that hangs will not be found by it"):
            self.file.parent.mkdir(exist_ok=True)
            new.write_text(json.dumps({"step": step, "host": self.host, "time": time.time()}) + "\n")
            new.replace(self.file)
        if not early_end.is_asked():  # there is one timer, which then ends a process that does not answer
            faulthandler.dump_traceback_later(self.timeout_s)

    def stop(self) -> None:
        """The run is over."""
        faulthandler.cancel_dump_traceback_later()
