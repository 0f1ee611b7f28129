"""Single starts of the trainer, each a process of its own: a user's mistake, a run that is finished.

test_bad_input.py has the other mistakes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
import torch
from generated_rows import write_rows
from zero3_files import complete_by_hand

from data_tools.build import build
from mirage_ds.checkpoint.save import Saves
from mirage_ds.data.plan import ORDER
from mirage_ds.data.shards import load_manifest
from mirage_ds.errors import CheckpointError, TrainingError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config
from mirage_ds.train import prepare_torch, train_steps
from mirage_ds.train_state import TrainState
from mirage_ds.training import early_end
from mirage_ds.training.step_clock import StepClock
from mirage_ds.zero3 import distributed

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mirage_ds.train", RECIPE, *arguments],
        env=launching.environment() | variables,
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
        "order": ORDER,
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
        "config": load_config(RECIPE, overrides).model_dump(mode="json"),
    }
    checkpoint = folder / "run" / "checkpoints" / "global_step20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps(facts))
    complete_by_hand(checkpoint)
    return folder / "run"


OVERRIDES = ["run.dir=run", "model.path=model", "data.shards=shards"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder `run`; its model and shards are beside it."""
    return write_finished_run(tmp_path_factory.mktemp("finished"), OVERRIDES)


def test_a_finished_run_says_so(finished: Path) -> None:
    """With exit code 0 and no mark of a preempted run, so that SLURM's job ends; before the model is loaded."""
    before = sorted(finished.rglob("*"))
    result = start(finished.parent, *OVERRIDES, "run.resume=auto")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "finished already: step 20 of 20 is saved in run/checkpoints/global_step20",
        "to export the model: mirage export --checkpoint run --output DIR",
        "to train longer: run.resume=extend with a larger train.max_steps or train.epochs; or a new run from these "
        "weights, with run.init_from=run and another run.dir",
    ]
    assert sorted(finished.rglob("*")) == before


SHOW = 'import os; print([os.environ.get(f"PYTORCH_{name}ALLOC_CONF") for name in ("CUDA_", "")]); os._exit(0)'


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ["expandable_segments:True", None]),
        ({"PYTORCH_ALLOC_CONF": "pinned_use_background_threads:True"}, [None, "pinned_use_background_threads:True"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ["backend:native", None]),
    ],
    ids=["unset", "newer name", "older name"],
)
def test_torch_is_loaded_with_segments_that_grow(
    finished: Path, tmp_path: Path, given: dict[str, str], seen: list[str | None]
) -> None:
    """Unless the user has set something. In torch's place stands a package that prints what it would read."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SHOW)
    path = f"{tmp_path}:{launching.environment()['PYTHONPATH']}"
    result = start(finished.parent, *OVERRIDES, "run.resume=auto", PYTHONPATH=path, **given)
    assert result.stdout.strip() == str(seen), result.stderr


def test_deterministic_runs_do_not_fill_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would fill each with NaN: of gigabytes, when ZeRO-3 gathers."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    random, fill = torch.get_rng_state(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        prepare_torch(load_config(RECIPE, ["train.deterministic=true"]))
        assert torch.are_deterministic_algorithms_enabled()
        torch.full((1000,), 7.0)
        assert not torch.empty(1000).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_rng_state(random)


def test_an_error_in_training_is_said_beside_that_of_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(distributed, "rank", lambda: 0)
    trainer = SimpleNamespace(
        state=TrainState(), train=lambda after_step: fail(TrainingError("the loss is not finite; take a smaller lr"))
    )
    saves = SimpleNamespace(
        finish=lambda: fail(CheckpointError("the checkpoint could not be written; free some space"))
    )
    config = load_config(RECIPE, [f"run.dir={tmp_path}"])
    with pytest.raises(TrainingError, match=r"not finite; take a smaller lr; besides, .*written; free some space"):
        train_steps(trainer, config, SimpleNamespace(encoder=None), saves, None, None)


@pytest.mark.parametrize(
    ("step", "interval", "fails", "expected"),
    [
        (4, 2, False, ["save", "evaluate"]),
        (9, 0, False, ["save and wait", "evaluate"]),  # the last step
        (4, 2, True, ["save", "evaluate"]),  # whose save is under way
        (4, 0, True, ["evaluate", "save and wait"]),
    ],
)
def test_a_step_is_saved_before_it_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, interval: int, fails: bool, expected: list[str]
) -> None:
    """So that an evaluation costs no more than itself; one that fails ends the run, which is saved then."""
    done: list[str] = []

    class Recorded(Saves):
        def save(self, state: TrainState, *, wait: bool) -> None:
            self.last_step = state.step
            done.append("save and wait" if wait else "save")

    class Evaluation:
        def __init__(self, trainer: object, config: object) -> None:
            self.trainer, self.config = trainer, config

        def __call__(self, step: int) -> None:
            done.append("evaluate")
            state.ends_early = fails

    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(early_end, "ignore", lambda: None)  # for this process
    state = TrainState(step, step)
    config = load_config(RECIPE, [f"run.dir={tmp_path}", f"checkpoint.interval={interval}", "evaluation.interval=2"])
    trainer = SimpleNamespace(
        state=state,
        max_steps=9,
        metrics=SimpleNamespace(flush=lambda: None),
        clock=StepClock(),
        save_progress=0,
        train=lambda after_step: [action(state) for action in after_step],
    )
    saves = Recorded(None, config, {})
    train_steps(trainer, config, SimpleNamespace(encoder=None), saves, None, Evaluation(trainer, config))
    assert done == expected
