"""Prints that nobody reads: the run must not end by them."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from mirage_ds import console
console.keep_going()
print("before")
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    print("after", file=stream, flush=True)
Path(sys.argv[1]).write_text("continued")
"""


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_print_without_a_reader_changes_nothing(tmp_path: Path, kind: str) -> None:
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writer, stderr=writer)
    os.close(writer)
    assert os.read(reader, 100).startswith(b"before")
    os.close(reader)
    process.communicate(b"\n", timeout=60)
    assert (process.returncode, (tmp_path / "end").read_text()) == (0, "continued")


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end")]
        subprocess.run(command, input=b"\n", stdout=full, stderr=full, check=True, timeout=60)
    assert (tmp_path / "end").read_text() == "continued"
