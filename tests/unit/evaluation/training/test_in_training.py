"""Evaluation in training without ranks: its questions, its figures, how ranks fail together.

What two ranks answer under ZeRO-3, and that training does not notice it: tests/distributed/test_evaluated_runs.py.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from generated_rows import write_jsonl, write_rows
from written_answers import ANSWER

from data_tools.build import build
from mirage_ds.config import EvaluationConfig
from mirage_ds.data.rows import read_questions
from mirage_ds.errors import DataError, EvaluationError, MemoryFullError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.compare import DECODING
from mirage_ds.evaluation.latents.arms import parse_arms
from mirage_ds.evaluation.latents.health import LatentHealth
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.results import parts_of
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.evaluation.settings import digest_of_rows
from mirage_ds.evaluation.tasks.outcome import Outcome
from mirage_ds.evaluation.training import evaluations
from mirage_ds.evaluation.training.evaluations import InTraining, forget
from mirage_ds.evaluation.training.figures import numbers, spread_of
from mirage_ds.evaluation.training.memory import name_full_memory
from mirage_ds.evaluation.training.questions import Questions, read_evaluation, read_some
from mirage_ds.evaluation.training.together import AskedToEndError, FailedError, Gather, leave_if_asked, together
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config
from mirage_ds.training import early_end
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.whole_model import without_hooks

RECIPE = Path(__file__).parents[4] / "launch" / "recipes" / "tiny-stage1.yaml"


def settings(rows: Path, **more: Any) -> EvaluationConfig:
    return EvaluationConfig(task="none", rows=rows, **more)


@pytest.mark.parametrize("shards", [False, True])
def test_questions_are_spread_over_the_rows(tmp_path: Path, shards: bool) -> None:
    """Of a JSONL file and of the shards made of it: the same texts, input images and helper images."""
    rows = write_rows(tmp_path / "rows", 10)
    source = rows
    if shards:
        source = tmp_path / "shards"
        build(rows, source, maxcount=4, maxsize=10**9)
    found = read_some(settings(source, max_rows=4), parse_arms("own,oracle"))
    assert [row.number for row in found] == [0, 2, 5, 7]
    samples = [sample for _, sample in read_questions(rows, helpers=True)]
    for row in found:
        expected = samples[row.number]
        assert row.sample.text_input == expected.text_input
        assert row.sample.input_images == expected.input_images
        assert row.sample.helper_images == expected.helper_images != ()
        assert row.sample.extra == expected.extra


def test_rows_that_cannot_be_asked_are_refused_before_the_run(tmp_path: Path) -> None:
    damaged = write_rows(tmp_path / "rows", 2)
    (tmp_path / "rows" / "images" / "1_0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"rows.jsonl:2"):
        read_some(settings(damaged), parse_arms("own"))
    alone = write_jsonl(tmp_path / "one.jsonl", [{"text_input": "Where?", "image_input": []}])
    with pytest.raises(DataError, match=r"\(evaluation.rows=.*one.jsonl, evaluation.latents=shuffled\); needed"):
        read_some(settings(alone), parse_arms("own,shuffled"))


@pytest.mark.parametrize("given", [{"task": "none"}, {"rows": "rows.jsonl"}])
def test_task_and_rows_belong_together(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"evaluation.task and evaluation.rows belong together"):
        EvaluationConfig(**given)


def test_figures_are_shares_of_the_answers() -> None:
    """An answer that could not be scored counts for no success, and for the other shares."""

    def scored(success: float, **more: Any) -> Answer:
        return replace(ANSWER, scores={"exact": Outcome(success, "")}, **more)

    own = [scored(1), scored(0), scored(1, num_blocks=0), replace(ANSWER, unscored="no letter", complete=False)]
    mean = [scored(0, arm="mean")] * 4
    assert numbers({"own": own, "mean": mean}, load_task("vsp-spatial-reasoning")) == {
        "success": pytest.approx(2 / 3),
        "cut_off": 0.25,
        "with_blocks": 0.75,
        "success_mean": 0,
        "cut_off_mean": 0,
        "with_blocks_mean": 1,
    }


def test_the_spread_is_a_mean_over_rows() -> None:
    """A slot of one row says nothing of how rows differ."""
    lists: dict[str, Any] = {"row_cosines": [0.5, 0.9, None], "effective_ranks": [3.0, 2.0, 1.0]}
    health = LatentHealth(1.0, slots=["0.0", "0.1", "1.0"], num_rows=[6, 2, 1], **lists)
    assert spread_of(health) == {"row_cosine": pytest.approx(0.6), "effective_rank": pytest.approx(2.75)}
    assert spread_of(LatentHealth(1.0, slots=["0.0"], num_rows=[1], row_cosines=[None], effective_ranks=[1.0])) == {}


def test_what_an_earlier_start_wrote_of_a_step_is_forgotten(tmp_path: Path) -> None:
    output = tmp_path / "step_5.jsonl"
    (tmp_path / "step_5.jsonl.parts").mkdir()
    for name in ("step_5.jsonl", "step_5.jsonl.summary.json", "step_5.jsonl.parts/rank_0.jsonl", "step_10.jsonl"):
        (tmp_path / name).write_text("old")
    forget(output)
    assert [path.name for path in tmp_path.iterdir()] == ["step_10.jsonl"]


def on_ranks(monkeypatch: pytest.MonkeyPatch, works: list[Callable[[Gather], None]]) -> list[Exception | None]:
    """How `together` fails on ranks that are threads; a rank that waits for ever fails."""
    barrier, place = threading.Barrier(len(works)), threading.local()
    exchanged: list[Any] = [None] * len(works)

    def gather(value: Any) -> list[Any]:
        exchanged[place.rank] = value
        barrier.wait(timeout=20)
        found = list(exchanged)
        barrier.wait(timeout=20)
        return found

    def run(rank: int) -> Exception | None:
        place.rank = rank
        try:
            together(works[rank])
        except FailedError as failed:
            return failed.fault
        return None

    monkeypatch.setattr(distributed, "gather", gather)
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, range(len(works))))


def test_a_rank_that_fails_ends_the_work_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two exchanges, or after the last one; all get its error, and none waits for ever."""
    log: list[str] = []

    def well(gather: Gather) -> None:
        assert sorted(gather(len(log))) == [0, 0]
        gather(None)
        log.append("to the end")

    def fails(gather: Gather) -> None:
        gather(0)
        raise DataError("the second rank's disk")

    def fails_late(gather: Gather) -> None:
        gather(0)
        gather(None)
        raise OSError("no space")

    assert on_ranks(monkeypatch, [well, well]) == [None, None]
    assert len(log) == 2
    log.clear()
    assert [str(fault) for fault in on_ranks(monkeypatch, [well, fails])] == ["the second rank's disk"] * 2
    assert not log
    assert [type(fault) for fault in on_ranks(monkeypatch, [well, fails_late])] == [OSError] * 2


def test_full_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings that decide how much is needed; any other error stays a bug."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    evaluation = settings(Path("rows.jsonl"), batch_size=7, max_new_tokens=99)
    needed = r"rank 1 .*evaluation\.batch_size=7, evaluation\.max_new_tokens=99, evaluation\.latents=own\): .*20 GiB"
    with pytest.raises(MemoryFullError, match=needed), name_full_memory(evaluation):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore")
    with pytest.raises(RuntimeError, match="shapes"), name_full_memory(evaluation):
        raise RuntimeError("shapes do not match")


def test_a_rehearsal_that_does_not_fit_names_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device lacks memory while the longest questions are decoded: the run ends before its first step."""

    def engine(_: InTraining) -> Any:
        return SimpleNamespace(rehearse=full)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(evaluations, "decoding", lambda module, backbone: nullcontext())
    monkeypatch.setattr(evaluations, "future_moments", lambda engine: [])
    monkeypatch.setattr(InTraining, "engine", engine)
    nothing: Any = None
    trainer: Any = SimpleNamespace(engine=SimpleNamespace(module=None), device=torch.device("cpu"))
    config: Any = SimpleNamespace(evaluation=settings(Path("rows.jsonl"), batch_size=7, max_new_tokens=99))
    words = r"rank 1 .*evaluation\.batch_size=7, evaluation\.max_new_tokens=99, .*20 GiB\.; .* set one of these lower"
    with pytest.raises(MemoryFullError, match=words):
        InTraining(trainer, nothing, nothing, config).rehearse()


def run_of(tmp_path: Path, faults: list[Any], end_s: float | None = None) -> InTraining:
    """Without a model: what it makes of a fault, and of the time that is left."""
    trainer: Any = SimpleNamespace(agree_on_fault=faults.append, early_end=EarlyEnd(end_s, 100), device="cpu")
    config: Any = SimpleNamespace(run=SimpleNamespace(dir=tmp_path))
    nothing: Any = None
    return InTraining(trainer, nothing, nothing, config)


@pytest.mark.parametrize("is_main", [True, False])
def test_what_follows_a_failed_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_main: bool
) -> None:
    """A user's mistake ends the run; a full disk, or the wish to end, ends the evaluation, and one rank says so."""
    monkeypatch.setattr(distributed, "is_main", lambda: is_main)
    faults: list[Any] = []
    run, output = run_of(tmp_path, faults), tmp_path / f"{is_main}.jsonl"
    run.fail(3, output, OSError("no space"))
    run.fail(3, output, AskedToEndError())
    assert not faults
    said = "".join(capsys.readouterr())
    assert said.count("no evaluation after step 3") == (2 if is_main else 0)
    parts_of(output).mkdir()
    run.fail(3, output, MemoryFullError("too little"))
    assert parts_of(output).exists() != is_main  # nothing continues it
    assert [(type(fault), str(fault)) for fault in faults] == [
        (EvaluationError, "the evaluation after step 3 failed: too little")
    ]


def test_a_signal_ends_the_evaluation_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(gather: Gather) -> None:
        gather(0)
        gather(None)

    def is_asked(gather: Gather) -> None:
        gather(0)
        leave_if_asked(1, 2)
        pytest.fail("it decodes another batch")

    monkeypatch.setattr(early_end, "is_asked", lambda: True)
    assert [type(fault) for fault in on_ranks(monkeypatch, [decodes, is_asked])] == [AskedToEndError] * 2
    monkeypatch.setattr(early_end, "is_asked", lambda: False)
    leave_if_asked(1, 2)


@pytest.mark.parametrize(("other_rank", "left_s", "has_time"), [(0, 400, True), (0, 350, False), (1, 400, False)])
def test_an_evaluation_that_does_not_fit_before_the_job_ends_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_rank: int, left_s: float, has_time: bool
) -> None:
    """The longest so far took 280 s, and 100 s are for the checkpoint; one rank without time is enough."""
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: [max(*values, other_rank)])
    run = run_of(tmp_path, [], end_s=time.time() + left_s)
    run.seconds.extend([20, 280, 30])
    assert run.has_time(7) == has_time


def test_hooks_are_set_aside_and_come_back() -> None:
    """In their order, and after an exception too."""
    called: list[str] = []
    inner = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(inner)
    module.register_forward_pre_hook(lambda *_: called.append("first"))
    inner.register_forward_hook(lambda *_: called.append("inner"))
    module.register_forward_pre_hook(lambda *_: called.append("second"))

    def compute(inputs: torch.Tensor) -> None:
        with without_hooks(module):
            module(inputs)

    compute(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        compute(torch.zeros(1, 3))
    assert not called
    module(torch.zeros(1, 2))
    assert called == ["first", "second", "inner"]


def test_helper_images_are_checked_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that cannot be pooled are said once, and end a run alone that asks for `oracle`."""
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    rows = write_rows(tmp_path / "rows", 4)
    write_tiny(rows, tmp_path / "model", seed=0)
    names = {"model.path": tmp_path / "model", "data.shards": tmp_path, "run.dir": tmp_path / "run"}
    names |= {"evaluation.task": "none", "evaluation.rows": rows, "model.latent_size": 10}
    overrides = [f"{name}={value}" for name, value in names.items()]
    questions = read_evaluation(load_config(RECIPE, overrides))
    assert questions is not None
    assert len(questions.rows) == 4
    assert capsys.readouterr().out.count("cannot be pooled to latent targets: 2; the first: ") == 1
    with pytest.raises(DataError, match=r"9 merged patches for 10 latents \(.*rows.jsonl:1, for the arm oracle\)"):
        read_evaluation(load_config(RECIPE, [*overrides, "evaluation.latents='own,oracle'"]))


@pytest.mark.parametrize("shards", [False, True])
def test_the_rows_of_a_summary_are_those_of_evaluate(tmp_path: Path, shards: bool) -> None:
    """So that `mirage compare` compares both."""
    path = source = write_rows(tmp_path / "rows", 4)
    if shards:
        source = tmp_path / "shards"
        build(path, source, maxcount=4, maxsize=10**9)
    names = {"model.path": "x", "data.shards": tmp_path, "run.dir": "run", "evaluation.task": "none"}
    overrides = [f"{name}={value}" for name, value in (names | {"evaluation.rows": source}).items()]
    config, arms = load_config(RECIPE, overrides), parse_arms("own")
    questions = Questions(load_task("none"), arms, read_some(config.evaluation, arms), cast("Any", None))
    backbone = cast("Any", SimpleNamespace(describe=lambda: "float32"))
    found = InTraining(cast("Any", None), backbone, questions, config).settings(4)
    assert found["data"] == str(source)
    assert found["rows"] == digest_of_rows(read_questions_of(path))["rows"]
    assert found["rows"] != digest_of_rows(read_questions_of(path, limit=3))["rows"]
    assert {name: found[name] for name in ("samples", "latent_end", "temperature")} == {
        "samples": 1,
        "latent_end": "fixed",
        "temperature": 0,
    }
    assert set(DECODING) <= set(found), "it would be said to be decoded otherwise"
