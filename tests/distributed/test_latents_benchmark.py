"""The short form of the benchmark of latents: text and one arm train and answer; a second start repeats nothing."""

import json
import subprocess
import sys
from pathlib import Path

import launching
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def benchmark(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.do_latents_matter", "--short", "--output", str(output), *options]
    return subprocess.run(
        command, env=launching.environment(), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


def test_the_short_form(tmp_path: Path) -> None:
    first = benchmark(tmp_path / "run", "--task", "hidden", "--seeds", "1")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert first.stdout.count("$ mirage-launch local") == 2 + 2
    assert first.stdout.count("$ mirage evaluate") == 4
    for words in (
        "| text, same seconds |",
        "| stage 1 + stage 2 |",
        "| oracle |",
        "| oracle, after stage 1 alone |",
        " hours of parts, ",
    ):
        assert words in first.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["rates"]) == {"text", "text_seconds", "latents"}
    assert set(summary["rates"]["latents"]) == {"own", "none", "oracle"}
    assert summary["training"]["latents"]["samples"] == summary["training"]["text"]["samples"] == 4 * 64

    second = benchmark(tmp_path / "run", "--task", "hidden", "--seeds", "1")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "$" not in second.stdout
    assert second.stdout.strip() in first.stdout
    other = benchmark(tmp_path / "run", "--task", "vsp", "--seeds", "1")
    assert other.returncode == 2
    assert "one folder is for one task in one size" in " ".join(other.stderr.split())
