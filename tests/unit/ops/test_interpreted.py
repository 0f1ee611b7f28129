"""Runs tests/interpreted in a separate process: see its conftest.py."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_interpreted() -> None:
    folder = Path(__file__).parents[2] / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(run.stdout)
    assert run.returncode == 0
    assert "skipped" not in run.stdout
