"""A sign of life of each rank, so that from outside one sees which rank of a run that stands still is behind.

RUN/heartbeat/rank_N    {"step": 20, "host": "node7", "time": 1780000000.0}, rewritten after each step
"""

import faulthandler
import json
import socket
import time
from pathlib import Path

FOLDER = "heartbeat"


class Heartbeat:
    """This rank's file; if it stays the same for too long, this rank also prints where it stands."""

    def __init__(self, run_dir: Path, rank: int, timeout_s: int) -> None:
        """
        Args:
            timeout_s: seconds without a beat after which Python's stacks go to stderr, once.
        """
        self.file, self.timeout_s = run_dir / FOLDER / f"rank_{rank}", timeout_s
        self.file.parent.mkdir(exist_ok=True)
        self.host = socket.gethostname()

    def beat(self, step: int) -> None:
        """So many steps are done, here and now."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"step": step, "host": self.host, "time": time.time()}) + "\n")
        new.replace(self.file)
        faulthandler.dump_traceback_later(self.timeout_s)

    def stop(self) -> None:
        """The run is over."""
        faulthandler.cancel_dump_traceback_later()
