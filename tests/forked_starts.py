"""Starts the trainer many times with a single import: each start is a fork of this process.

python forked_starts.py < [{"name": ..., "arguments": [...], "folder": ...}, ...]      exit codes as JSON on stdout;
the output of a start is in FOLDER/../NAME.log
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import launching


def run(starts: list[dict[str, Any]], timeout_s: float) -> dict[str, int]:
    """Exit code of each start."""
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(starts),
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def log_of(start: dict[str, Any]) -> Path:
    return Path(start["folder"]).parent / f"{start['name']}.log"


def fork(start: dict[str, Any], main: Any) -> int:
    child = os.fork()
    if child == 0:
        log = os.open(log_of(start), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(start["folder"])
        sys.argv = ["mirage_ds.train", *start["arguments"]]
        main()
        os._exit(0)  # main ended without an error
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train() -> None:
    """What `python -m mirage_ds.train` does with its command line."""
    from mirage_ds.train import run
    from mirage_ds.training.early_checks import read_command_line

    run(read_command_line())


if __name__ == "__main__":
    import mirage_ds.train  # noqa: F401  (here, so that no fork has to)

    print(json.dumps({start["name"]: fork(start, train) for start in json.load(sys.stdin)}))
