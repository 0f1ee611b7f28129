"""Copies checkpoints to a second folder in the background: COPY_TO/NAME_OF_RUN_FOLDER/global_stepN.

To resume from a copy: cp -r COPY_TO/NAME/global_stepN RUN/checkpoints/, then start with run.resume=auto.
"""

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mirage_ds.checkpoint import complete


class Copies:
    """Copies checkpoints one at a time in a background thread. An error is printed, and the run continues."""

    def __init__(self, folder: Path, keep_latest_k: int) -> None:
        """
        Args:
            folder: for this run's copies only.
            keep_latest_k: complete copies to keep, as many as the run keeps checkpoints.
        """
        self.folder, self.keep_latest_k = folder, keep_latest_k
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy of a checkpoint")

    def add(self, checkpoint: Path) -> None:
        """Queues a complete checkpoint for copying."""
        self.thread.submit(self.copy, checkpoint)

    def copy(self, checkpoint: Path) -> None:
        started_s = time.monotonic()
        part = self.folder / (checkpoint.name + complete.PART)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            complete.remove_parts(self.folder)
            shutil.copytree(checkpoint, part)
            final = complete.publish(part)
            complete.prune(self.folder, complete.step_of(final) or 0, self.keep_latest_k)
        except OSError as error:  # shutil.Error, too: a failed copy must not end the run
            shutil.rmtree(part, ignore_errors=True)
            print(
                f"WARNING: {checkpoint} was not copied ({part.parent}): {error}; the checkpoint itself is complete and "
                "the run continues; free some space there, or check that checkpoint.copy_to is writable and that a "
                "copy takes less time than checkpoint.interval",
                file=sys.stderr,
                flush=True,
            )
            return
        print(f"Copied {checkpoint} to {self.folder} in {time.monotonic() - started_s:.1f} s", flush=True)

    def wait(self) -> None:
        """Waits for the last copy."""
        self.thread.shutdown()
