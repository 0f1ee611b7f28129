"""Runs the tests of the interpreted kernels, each in a separate process: see tests/interpreted/conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["interpreted", pytest.param("distributed/test_kernels.py", marks=pytest.mark.slow)])
def test_kernels_interpreted(path: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / path)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(run.stdout)
    assert run.returncode == 0
    assert "skipped" not in run.stdout
