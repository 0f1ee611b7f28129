"""How tests are divided over pytest-xdist's workers: by its own scheduler, with our groups."""

import os
import subprocess
import sys
from pathlib import Path

import groups

CONFTEST = """
from groups import Groups

def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)
"""
TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(5))
def test(number):
    with open(__file__ + ".workers", "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)
"""


def test_groups() -> None:
    """SLURM once, a page by itself, otherwise a file."""
    cluster = {
        groups.group(f"tests/cluster/{name}") for name in ("test_jobs.py::test_a[x]", "test_failures.py::test_b")
    }
    assert len(cluster) == 1
    pages = [groups.group(f"tests/docs/test_blocks.py::test_the_blocks[{page}]") for page in ("README.md", "docs/a.md")]
    assert pages[0] != pages[1]
    assert groups.group("tests/unit/test_a.py::test[1::2]") == groups.group("tests/unit/test_a.py::test_b")


def test_the_tests_of_a_file_run_in_one_worker(tmp_path: Path) -> None:
    """In a real session of two workers."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    files = [tmp_path / f"test_{name}.py" for name in "abcd"]
    for file in files:
        file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadscope", "."]
    paths = f"{Path(groups.__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    ran_by = [Path(f"{file}.workers").read_text().split() for file in files]
    assert [len(workers) for workers in ran_by] == [5] * len(files)
    assert all(len(set(workers)) == 1 for workers in ran_by)
    assert len({workers[0] for workers in ran_by}) == 2
