"""What a user reads after a mistake, by a process of its own; test_bad_input.py has the other mistakes."""

import subprocess
import sys
from pathlib import Path

import launching
import pytest

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RECIPE, "train.warmup_step=1"], "unknown key train.warmup_step: did you mean 'warmup_steps'?"),
        ([RECIPE, "data.shards=nowhere"], "no manifest.json"),
    ],
    ids=["key", "shards"],
)
def test_a_mistake_costs_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mirage_ds.train", *arguments],
        env=launching.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
