"""The training loop over an engine that stands in: what it does with losses that are not finite."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dealt import in_order

from mirage_ds.config import TrainConfig
from mirage_ds.data.steps import Share
from mirage_ds.errors import DataError, EvaluationError, StallError, TrainingError
from mirage_ds.model.mirage import Losses
from mirage_ds.train_state import TrainState
from mirage_ds.training import early_end
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.trainer import Trainer
from mirage_ds.training.validation import Validation
from mirage_ds.zero3 import distributed


class Engine:
    """Skips a step whose gradient is not finite, as DeepSpeed does; the loss of each step is given."""

    def __init__(self, losses: list[float], gradients: list[float]) -> None:
        self.losses, self.gradients = iter(losses), iter(gradients)
        self.weight = torch.ones((), requires_grad=True)
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self.skipped_steps = self.steps = 0

    def __call__(self, **inputs: Any) -> Losses:
        gradient = next(self.gradients)
        loss = next(self.losses) + self.weight - 1
        loss.register_hook(lambda outer: outer * gradient)
        return Losses(loss, torch.zeros(()), torch.zeros(()))

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        finite = math.isfinite(self.weight.grad)
        self.steps += finite
        self.skipped_steps += not finite
        self.weight.grad = None

    def get_global_grad_norm(self) -> float:
        return 1.0


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"world_size": 1, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(early_end, "only_remember", lambda: None)  # for this process
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])


def make(run: Path, losses: list[float], gradients: list[float] | None = None, allowed: int = 3) -> Trainer:
    steps = len(losses)
    train = TrainConfig(stage="text", max_steps=steps, warmup_steps=0, max_skipped_steps=allowed)
    batch = SimpleNamespace(keys=["a/1"], num_grounded_samples=0, num_tokens=5, num_cells=5, faults=[])
    batch.to = lambda device: batch
    metrics = Metrics(run, stage="text", global_batch_size=1, max_steps=steps, log_freq=1)
    return Trainer(
        Engine(losses, gradients or [1.0] * steps),
        iter([batch] * steps),
        in_order(Share(0, 1, 1)),
        train,
        metrics,
        TrainState(),
        max_steps=steps,
        device=torch.device("cpu"),
        agree_on_passes=False,
        early_end=EarlyEnd(end_s=None, margin_s=0),
    )


def test_an_infinite_loss_changes_no_weight_even_if_its_gradient_is_finite(tmp_path: Path) -> None:
    trainer = make(tmp_path, [1.0, math.inf, 1.0])
    trainer.train()
    assert (trainer.engine.steps, trainer.engine.skipped_steps) == (2, 1)


def test_a_gradient_alone_is_enough(tmp_path: Path) -> None:
    """Then no loss tells which sample it was: all of the step are named, with their losses."""
    trainer = make(tmp_path, [1.0, 2.0, 1.0], [1.0, math.nan, 1.0])
    trainer.train()
    assert (tmp_path / "bad_batches.jsonl").read_text() == (
        '{"step": 2, "positions": [1], "rank": 0, "keys": ["a/1"], "loss": 2.0}\n'
    )


@pytest.mark.parametrize("allowed", [1, 3])
def test_skipped_steps_in_a_row_end_the_run(tmp_path: Path, allowed: int) -> None:
    """Those before a good step do not count."""
    nan = math.nan
    trainer = make(tmp_path, [1.0, *[nan] * (allowed - 1), 1.0, *[nan] * allowed, 1.0], allowed=allowed)
    with pytest.raises(TrainingError, match=rf"in {allowed} steps in a row \(up to step {2 * allowed + 1};"):
        trainer.train()


def test_a_first_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"first loss is not finite .*bad_batches\.jsonl\).*model\.path"):
        make(tmp_path, [math.nan, 1.0], allowed=100).train()


def test_a_fault_ends_the_run_between_two_steps_after_its_actions(tmp_path: Path) -> None:
    """The action that would save knows that it is the last; the message says how to continue."""
    trainer = make(tmp_path, [1.0] * 5)
    good = next(trainer.batches)

    def batches() -> Iterator[Any]:
        yield from [good, good]
        raise DataError("the image cannot be decoded (a/7)")

    trainer.batches = batches()
    seen: list[tuple[int, bool]] = []
    with pytest.raises(TrainingError, match=r"\(a/7\); the run ends after step 2, which is saved; .*on_fault=skip"):
        trainer.train(after_step=[lambda state: seen.append((state.step, state.ends_early))])
    assert seen == [(1, False), (2, True)]


def test_a_failed_evaluation_is_not_blamed_on_a_sample(tmp_path: Path) -> None:
    trainer = make(tmp_path, [1.0] * 5)
    fault = EvaluationError("the evaluation after step 1 failed: no such field")
    with pytest.raises(EvaluationError, match=r"after step 1, which is saved, .*evaluation\.task=null") as error:
        trainer.train(after_step=[lambda state: trainer.agree_on_fault(fault)])
    assert "on_fault" not in str(error.value)
    last = make(tmp_path, [1.0])
    last.max_steps = 1
    with pytest.raises(EvaluationError, match=r"export it and use mirage evaluate$"):  # no steps are left
        last.train(after_step=[lambda state: last.agree_on_fault(fault)])
    assert isinstance(error.value, TrainingError)  # for which a save under way is finished


def test_a_fault_in_validation_ends_the_run_after_its_actions(tmp_path: Path) -> None:
    trainer = make(tmp_path, [1.0] * 5)
    trainer.engine.eval = trainer.engine.train = lambda: None

    def read_batch(numbers: list[int]) -> Any:
        raise DataError("the image cannot be decoded (a/7)")

    validation = Validation(
        trainer.engine, trainer.num_passes, trainer.agree_on_fault, read_batch, [0, 1], 1, torch.device("cpu")
    )
    losses: list[Any] = []
    ends: list[bool] = []
    with pytest.raises(TrainingError, match=r"\(a/7\); the run ends after step 1, which is saved; .*on_fault=skip"):
        trainer.train(
            after_step=[lambda state: losses.append(validation.losses()), lambda state: ends.append(state.ends_early)]
        )
    assert (losses, ends) == ([None], [True])


def test_passes_that_another_rank_has_no_columns_for_end_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank has 5 columns; another one needs 7 passes over its 9. The message is the same on both."""
    trainer = make(tmp_path, [1.0])
    trainer.agree_on_passes = True
    trainer.engine.module = SimpleNamespace(rollout=SimpleNamespace(num_passes=lambda columns: 2))
    monkeypatch.setattr(
        distributed, "max_over_ranks", lambda values, device: [max(each) for each in zip(values, [7, -9], strict=True)]
    )
    monkeypatch.setattr(distributed, "gather", lambda value: [(9, ["a/2"]), value])
    batch = SimpleNamespace(input_ids=torch.zeros(1, 5), latent_columns=[[1, 2]], keys=["a/1"])
    with pytest.raises(TrainingError, match=r"has 5 columns, and .* needs 7 latent passes \(a/1\); .*gather=rollout"):
        trainer.num_passes(batch)


def test_a_stall_is_no_fault_of_the_user(tmp_path: Path) -> None:
    """Exit code 1, after which SLURM jobs start again."""
    trainer = make(tmp_path, [1.0] * 3)

    def batches() -> Iterator[Any]:
        raise StallError("no batch came for 8 s")
        yield

    trainer.batches = batches()
    with pytest.raises(StallError, match=r"no batch came for 8 s; the run ends before its first step; start it again"):
        trainer.train()
    assert StallError.exit_code == 1
