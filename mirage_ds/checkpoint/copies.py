"""Copies of checkpoints in a second place, made in the background: COPY_TO/NAME OF THE RUN'S FOLDER/global_stepN.

To go on from one, copy it back: cp -r COPY_TO/NAME/global_stepN RUN/checkpoints/, and start with run.resume=auto.
"""

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mirage_ds.checkpoint import complete


class Copies:
    """One thread that copies checkpoint after checkpoint. An error there is printed; the run goes on."""

    def __init__(self, folder: Path, keep_latest_k: int) -> None:
        """
        Args:
            folder: of this run's copies alone; as many are kept as of the checkpoints themselves.
        """
        self.folder, self.keep_latest_k = folder, keep_latest_k
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copy of a checkpoint")

    def add(self, checkpoint: Path) -> None:
        """Has a complete checkpoint copied, after those that were added before."""
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
        except OSError as error:  # shutil.Error, too: the second place must not end the run
            shutil.rmtree(part, ignore_errors=True)
            print(
                f"WARNING: {checkpoint} was not copied ({part.parent}): {error}; the checkpoint itself is whole and "
                "the run goes on; make room there, or see that checkpoint.copy_to may be written and is faster than "
                "checkpoint.interval",
                file=sys.stderr,
                flush=True,
            )
            return
        print(f"copied {checkpoint} to {self.folder} in {time.monotonic() - started_s:.1f} s", flush=True)

    def wait(self) -> None:
        """Ends with the last copy."""
        self.thread.shutdown()
