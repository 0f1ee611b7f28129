"""A short form of `make demo`: the same code and commands with few steps. What it learns is not tested here."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import launching
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

NAMES = {"untrained", "text", "stage1", "stage1_oracle", "stage2"}
NAMES |= {f"stage2_{replaced}" for replaced in ("shuffled", "mean", "noise", "zeroed", "oracle")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it ran in, with its output."""
    folder = tmp_path_factory.mktemp("demo")
    result = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--short", "--output", str(folder / "run")],
        env=launching.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (folder / "output").write_text(result.stdout)
    return folder


def test_figures(demo: Path) -> None:
    summary = json.loads((demo / "run" / "summary.json").read_text())
    rates = {f"success_{name}" for name in NAMES}
    assert rates | {"malformed", "num_test", "seconds", "seconds_total"} == set(summary)
    assert all(0 <= summary[name] <= 1 for name in rates)
    assert set(summary["malformed"]) == NAMES
    assert summary["num_test"] == 16
    assert all(seconds > 0 for seconds in [*summary["seconds"].values(), summary["seconds_total"]])


def test_what_is_left_behind(demo: Path) -> None:
    """A picture, answers, TensorBoard's files, validation losses, and checkpoints of all three runs."""
    answers = [json.loads(line) for line in (demo / "run" / "stage2-answers.jsonl").read_text().splitlines()]
    assert Counter(answer["arm"] for answer in answers) == dict.fromkeys(
        ("own", "shuffled", "mean", "noise:1.0", "zeroed", "oracle"), 16
    )
    with Image.open(demo / "run" / "answers.png") as picture:
        assert picture.width > 600
    for stage in ("text", "stage1", "stage2"):
        assert list((demo / "run" / stage / "tensorboard").glob("events.out.tfevents.*"))
        assert (demo / "run" / stage / "checkpoints" / "latest").exists()
        (record,) = [json.loads(line) for line in (demo / "run" / stage / "validation.jsonl").read_text().splitlines()]
        assert record["loss"] > 0


def test_what_is_said(demo: Path) -> None:
    """Every command as a user would type it, the table, what follows from it, and where things are."""
    output = (demo / "output").read_text()
    assert output.count("$ mirage-launch local --ranks 2") == 3
    assert output.count("$ mirage-data build") == 2
    assert output.count("$ mirage evaluate") == 4
    labels = ("stage 1 + stage 2", "with shuffled latents", "with noise added", "with oracle latents")
    for words in (*labels, "95% interval", "own latents minus text only:", "own minus shuffled latents:"):
        assert words in output
    assert re.findall(r"with oracle latents .* (\d+) ", output) == ["256", "512"]  # samples: stage 1, both stages
    assert f"mirage generate --model {demo / 'run' / 'stage2-model'} --prompt" in output
    assert f"tensorboard --logdir {demo / 'run'}" in output.replace("\n", "")


def test_an_existing_folder_is_refused(demo: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--output", str(demo / "run")],
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode != 0
    assert "the folder exists already" in result.stderr


@pytest.mark.skipif(
    "MIRAGE_VSP_DIR" not in os.environ,
    reason="MIRAGE_VSP_DIR does not name the reference's own rows, which have no licence to be shipped",
)
def test_its_model_answers_the_reference_s_planning_rows(demo: Path) -> None:
    """All of them, by the command; the table has their levels."""
    data = Path(os.environ["MIRAGE_VSP_DIR"]) / "test" / "test_part.jsonl"
    command = ["mirage", "evaluate", "--model", str(demo / "run" / "stage2-model"), "--task", "vsp-spatial-planning"]
    command += ["--data", str(data), "--output", str(demo / "results.jsonl"), "--max-new-tokens", "16"]
    result = subprocess.run(command, env=launching.environment(), capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    answers = [json.loads(line) for line in (demo / "results.jsonl").read_text().splitlines()]
    assert [answer["row"]["map_id"] for answer in answers] == [row["map_id"] for row in rows]
    for level in ("3", "4", "5", "6"):
        count = sum(len(row["map_desc"]) == int(level) for row in rows)
        assert re.search(rf"{level}\W+{count}\W", result.stdout)
