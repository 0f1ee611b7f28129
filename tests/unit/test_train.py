"""Single starts of the trainer, each a process of its own: a user's mistake, a run that is finished.

test_bad_input.py has the other mistakes.
"""

import json
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from generated_rows import write_rows
from zero3_files import complete_by_hand

from data_tools.build import build
from mirage_ds.data.shards import load_manifest
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mirage_ds.train", RECIPE, *arguments],
        env=launching.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.warmup_step=1", "unknown key train.warmup_step: did you mean 'warmup_steps'?"),
        ("data.shards=nowhere", "no manifest.json"),
    ],
    ids=["key", "shards"],
)
def test_a_mistake_costs_one_message(tmp_path: Path, argument: str, message: str) -> None:
    result = start(tmp_path, argument)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def write_finished_run(folder: Path, overrides: list[str]) -> Path:
    """A run whose last step is saved, as far as a start looks at it; the model's weights are gone."""
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    (folder / "model" / "model.safetensors").unlink()
    facts = {
        "step": 20,
        "position": 40,
        "world_size": 1,
        "global_batch_size": 2,
        "max_steps": 20,
        "manifest_digest": load_manifest(folder / "shards").digest,
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
        "config": load_config(RECIPE, overrides).model_dump(mode="json"),
    }
    checkpoint = folder / "run" / "checkpoints" / "global_step20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps(facts))
    complete_by_hand(checkpoint)
    return folder / "run"


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    """With exit code 0 and no mark of a preempted run, so that SLURM's job ends; before the model is loaded."""
    overrides = ["run.dir=run", "model.path=model", "data.shards=shards"]
    run = write_finished_run(tmp_path, overrides)
    before = sorted(run.rglob("*"))
    result = start(tmp_path, *overrides, "run.resume=auto")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "finished already: step 20 of 20 is saved in run/checkpoints/global_step20",
        "to export the model: mirage export --checkpoint run --output DIR",
        "to train longer: run.resume=extend with a larger train.max_steps or train.epochs; or a new run from these "
        "weights, with run.init_from=run and another run.dir",
    ]
    assert sorted(run.rglob("*")) == before
