"""One program writes one output: an owner file beside it, made atomically, that also other nodes of a shared disk see.

.NAME.owner   JSON: host, pid, SLURM job, start time and a random token; its time stamp is the last sign of life
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError

BEAT_S = 30  # between two signs of life
STALE_S = 600  # without one, the owner has ended


class Owner:
    """The owner of an output, from `with` to its end."""

    def __init__(self, output: Path) -> None:
        """
        Args:
            output: an absolute path, whose parent exists.
        """
        self.output = output
        self.file = output.parent / f".{output.name}.owner"
        self.token = secrets.token_hex(8)
        self._ended = threading.Event()

    def __enter__(self) -> "Owner":
        """Takes the output, from a dead owner too; that is said in a line.

        Raises:
            DataError: another program writes this output; the message says which.
        """
        own = {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "token": self.token}
        while not self._create(json.dumps(own | {"started": time.strftime("%Y-%m-%d %H:%M:%S %z")}) + "\n"):
            self._remove_dead_owner()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.file.unlink(missing_ok=True)

    def _create(self, text: str) -> bool:
        """Writes the file; False if there is one."""
        try:
            with self.file.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _remove_dead_owner(self) -> None:
        """
        Raises:
            DataError: the owner lives.
        """
        try:
            age_s = time.time() - self.file.stat().st_mtime
            found = json.loads(self.file.read_text())
        except FileNotFoundError:  # it has just ended
            return
        except ValueError:  # it has just begun, or ended before its first line
            if age_s > BEAT_S:
                self.file.unlink(missing_ok=True)
            time.sleep(0.1)
            return
        if _lives(found, age_s):
            raise DataError(
                f"another program writes this output ({self.output}): process {found['pid']} on {found['host']}, since "
                f"{found['started']}, last sign of life {age_s:.0f} s ago; allowed: one at a time; wait for it, or "
                "name another output"
            )
        claimed = self.file.with_name(f"{self.file.name}.{self.token}.dead")
        with contextlib.suppress(FileNotFoundError):  # another start was faster
            self.file.rename(claimed)
            if json.loads(claimed.read_text())["token"] != found["token"]:  # and has taken it over already
                claimed.rename(self.file)
                return
            claimed.unlink()
            print(
                f"took over {self.output} from process {found['pid']} on {found['host']}, which has ended",
                file=sys.stderr,
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a missed sign of life does no harm
                os.utime(self.file)


def _job() -> str | None:
    """This SLURM job; a job that was requeued is the same one, and its first start has ended."""
    return os.environ.get("SLURM_JOB_ID")


def _lives(owner: dict[str, Any], age_s: float) -> bool:
    if owner["host"] == socket.gethostname():
        return Path(f"/proc/{owner['pid']}").exists()
    return age_s < STALE_S and (owner["job"] is None or owner["job"] != _job())
