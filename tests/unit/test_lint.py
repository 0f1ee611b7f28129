"""`make lint` looks at the project's own files, whatever lies in a user's `runs/` and `models/`."""

import shutil
import subprocess
from pathlib import Path

import launching
import pytest

ROOT = Path(__file__).parents[2]
BADLY_WRITTEN = "import os\nx = {  'a':1 }\ndef f( a ):\n  return undefined\n"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_ruff_passes_over_runs_and_models(tmp_path: Path, command: tuple[str, ...]) -> None:
    """tests/cluster imports a module called `runs`: with a folder of that name its imports are sorted as without."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests" / "cluster", tmp_path / "tests" / "cluster")
    for folder in ("runs/x/jobs/1/code", "models/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "bad.py").write_text(BADLY_WRITTEN)
    ruff = [str(launching.BIN / "ruff"), *command, "--no-cache"]
    result = subprocess.run([*ruff, "."], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    (tmp_path / "bad.py").write_text(BADLY_WRITTEN)
    assert subprocess.run([*ruff, "."], cwd=tmp_path, capture_output=True).returncode == 1
