"""A trivial mistake is found before torch is loaded: every command, where importing torch is an error.

Also DeepSpeed and transformers, which take seconds as well.
"""

import json
import subprocess
import sys
from pathlib import Path

import launching
import pytest

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")
SLURM = ("--nodes", "2", "--gpus-per-node", "2")
PLAN = (*SLURM, "--gpu", "h100-80gb")
TAKEN = "data.shards=shards model.path=some/model run.dir=run"
UNCOUNTED = "data.shards=shards model.path=some/model data.packing=true data.token_budget=9"
ASKS = "data.shards=shards model.path=some/model evaluation.rows=shards"
EVALUATE = ("--task", "vsp-spatial-planning", "--output", "results")

MISTAKES = {
    "mirage-launch local none.yaml": "the recipe cannot be read (none.yaml)",
    f"mirage-launch local {RECIPE} train.none=1": "unknown key train.none",
    f"mirage-launch local {RECIPE}": "no manifest.json",
    f"mirage-launch local {RECIPE} data.shards=shards model.path=./none": "the model folder does not exist",
    f"mirage-launch local {RECIPE} {TAKEN}": "the folder holds another run already",
    f"mirage-launch local {RECIPE} {UNCOUNTED}": "run mirage-data count shards --model some/model",
    f"mirage-launch local {RECIPE} {ASKS} evaluation.task=none.py:score": "no such file (evaluation.task=none.py",
    f"mirage-launch local {RECIPE} --none": "No such option",
    f"mirage-launch slurm none.yaml {' '.join(SLURM)}": "the recipe cannot be read (none.yaml)",
    f"mirage-launch slurm {RECIPE} {' '.join(SLURM)}": "no manifest.json",
    f"mirage-launch slurm {RECIPE} {' '.join(SLURM)} {UNCOUNTED}": "run mirage-data count shards --model some/model",
    f"mirage-launch slurm {RECIPE} {' '.join(SLURM)} {ASKS} evaluation.task=vsp": "unknown task 'vsp' (evaluation.",
    f"mirage-launch plan none.yaml {' '.join(PLAN)}": "the recipe cannot be read (none.yaml)",
    f"mirage-launch plan {RECIPE} {' '.join(SLURM)} --gpu none": "unknown GPU (--gpu none)",
    f"mirage-launch plan {RECIPE} {' '.join(PLAN)} {ASKS} evaluation.task=vsp": "unknown task 'vsp' (evaluation.",
    "mirage-launch doctor none.yaml": "the recipe cannot be read (none.yaml)",
    "mirage-launch build-shards none.jsonl out --tasks 2 --time 1:00": "cannot read the rows",
    "mirage-data build --input none --output out": "cannot read the rows",
    "mirage-data check none": "no manifest.json",
    "mirage-data count none --model some/model": "no manifest.json",
    "mirage-data count shards --model ./none": "the model folder does not exist (--model ./none)",
    "mirage-data stats none": "no manifest.json",
    "mirage-data stats shards --model ./none": "the model folder does not exist (--model ./none)",
    "mirage-data preview none --output out.html": "no manifest.json",
    "mirage-data head none": "no manifest.json",
    "mirage-data filter shards --output out --where level": "not a condition (--where 'level')",
    "mirage-data split shards --output out --fractions 1": "invalid fractions (--fractions 1)",
    "mirage-data merge none --output out": "not a part of a build: ",
    "mirage init --preset tiny --text none --output out": "no such file (--text none)",
    "mirage init --from ./none --output out": "the model folder does not exist (--from ./none)",
    "mirage export --checkpoint none --output out": "no such folder (--checkpoint none)",
    "mirage generate --model none --prompt ?": "the model folder does not exist (--model none)",
    "mirage generate --model some/model --prompt ? --image none": "the image cannot be read: No such file",
    f"mirage evaluate --model none --data rows {' '.join(EVALUATE)}": "the model folder does not exist (--model none)",
    f"mirage evaluate --model some/model --data none {' '.join(EVALUATE)}": "cannot read the rows: No such file",
    "python -m mirage_ds.train none.yaml": "the recipe cannot be read (none.yaml)",
    f"python -m mirage_ds.train {RECIPE} train.lr=fast": "train.lr: ",
    f"python -m mirage_ds.train --local_rank=0 {RECIPE}": "no manifest.json",
    f"python -m mirage_ds.train {RECIPE} {TAKEN}": "the folder holds another run already",
    f"python -m mirage_ds.train {RECIPE} {ASKS} evaluation.task=exact evaluation.latents=x": "'x' is unknown (",
    f"python -m mirage_ds.train {RECIPE} --none": "unrecognized arguments: --none",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and another run; packages of these names that cannot be imported."""
    place = tmp_path_factory.mktemp("mistakes")
    shard = {"name": "a.tar", "samples": 1, "bytes": 10, "sha256": ""}
    manifest = {"format_version": 1, "num_samples": 1, "index_sha256": "", "shards": [shard]}
    for folder in ("packages", "cwd/shards", "cwd/run/checkpoints/global_step1"):
        (place / folder).mkdir(parents=True)
    for name in ("torch", "deepspeed", "transformers"):
        (place / "packages" / f"{name}.py").write_text(f"raise AssertionError('{name} is imported')\n")
    (place / "cwd" / "shards" / "a.tar").write_bytes(bytes(10))
    (place / "cwd" / "shards" / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line.replace(str(ROOT), ""))
def test_a_mistake_needs_no_torch(place: Path, line: str) -> None:
    program, *arguments = line.split()
    environment = launching.environment()
    environment["PYTHONPATH"] = f"{place / 'packages'}:{environment['PYTHONPATH']}"
    environment["HF_HUB_OFFLINE"] = "0"  # or some/model would be the mistake; nothing gets so far as to ask the hub
    result = subprocess.run(
        [sys.executable if program == "python" else str(launching.BIN / program), *arguments],
        cwd=place / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    assert MISTAKES[line] in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (place / "cwd").iterdir()) == ["run", "shards"]
