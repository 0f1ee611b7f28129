"""Evaluation in training without ranks: its questions, its figures, how ranks fail together, what is shown.

What two ranks answer under ZeRO-3, and that training does not notice it: tests/distributed/test_evaluated_runs.py.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from generated_rows import write_jsonl, write_rows
from PIL import Image

from data_tools.build import build
from mirage_ds.config import EvaluationConfig
from mirage_ds.data.rows import read_questions
from mirage_ds.errors import DataError
from mirage_ds.evaluation import in_training
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.arms import parse_arms
from mirage_ds.evaluation.in_training import FailedError, Gather, InTraining, forget, numbers, together
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.evaluation.settings import digests
from mirage_ds.evaluation.tasks.outcome import Outcome
from mirage_ds.evaluation.training_looks import GAP_PX, LATENT_MARK, LINE_PX, TILE_PX, marked, picture
from mirage_ds.evaluation.training_questions import Questions, read_evaluation, read_some
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config
from mirage_ds.zero3.whole_model import without_hooks

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
ANSWER = Answer(
    number=0,
    where="rows.jsonl:1",
    arm="own",
    sample=0,
    text="go right",
    num_tokens=9,
    num_blocks=1,
    num_latents=2,
    num_replaced=0,
    latents_at=[3, 3],
    complete=True,
)


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
    with pytest.raises(DataError, match=r"needed: at least 2"):
        read_some(settings(alone), parse_arms("own,shuffled"))


def test_helper_images_are_checked_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that cannot be pooled are said once, and end a run alone that asks for `oracle`."""
    monkeypatch.setattr(in_training.distributed, "is_main", lambda: True)
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

    monkeypatch.setattr(in_training.distributed, "gather", gather)
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


class Trained:
    """What an evaluation says to the trainer."""

    def __init__(self) -> None:
        self.faults: list[DataError] = []

    def agree_on_fault(self, fault: DataError) -> None:
        self.faults.append(fault)


@pytest.mark.parametrize("fault", [DataError("logits are not finite"), OSError("no space left")])
def test_what_a_failed_evaluation_does_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """A full disk is a warning; with anything else that has a name the run saves and ends."""

    def fails(*_: object) -> None:
        raise fault

    warnings: list[str] = []
    monkeypatch.setattr(in_training.distributed, "gather", lambda value: [value])
    monkeypatch.setattr(in_training, "warn_once", warnings.append)
    monkeypatch.setattr(InTraining, "evaluate", fails)
    trained, config = Trained(), load_config(RECIPE, ["model.path=x", f"data.shards={tmp_path}", "run.dir=run"])
    InTraining(cast("Any", trained), cast("Any", None), cast("Any", None), config)(4)
    if isinstance(fault, OSError):
        assert [type(each) for each in trained.faults] == []
        assert "no evaluation after step 4 (run/evaluations/step_4.jsonl): no space left" in warnings[0]
    else:
        assert [str(each) for each in trained.faults] == ["the evaluation after step 4 failed: logits are not finite"]
        assert not warnings


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
    assert found["rows"] == digests("none", read_questions_of(path))["rows"]
    assert found["rows"] != digests("none", read_questions_of(path, limit=3))["rows"]


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


def test_latents_are_marked_in_an_answer() -> None:
    assert marked(ANSWER) == f"go {LATENT_MARK}{LATENT_MARK}right"
    assert marked(replace(ANSWER, latents_at=[])) == "go right"


def test_a_picture_has_a_tile_for_each_image_and_latent(tmp_path: Path) -> None:
    """The largest cosine of all latents is orange, the smallest blue, the middle grey."""
    (sample,) = [sample for _, sample in read_questions(write_rows(tmp_path / "rows", 1), helpers=True)]
    maps = np.array([[[0.9, 0.7]], [[0.8, 0.8]]], np.float32)
    drawn = picture(sample, maps, [("question", "Where?"), ("answer", "right " * 100)], turned=True)
    assert drawn.height > 2 * (LINE_PX + TILE_PX) + 8 * LINE_PX  # two rows of tiles, and many lines of text

    def pixel(tile: int, x: float, y: float) -> tuple[int, ...]:
        """At a place of a tile, from 0 to 1."""
        left, above = GAP_PX + tile % 3 * (TILE_PX + GAP_PX), tile // 3 * (LINE_PX + TILE_PX + GAP_PX) + LINE_PX
        found = drawn.getpixel((left + int(x * TILE_PX), above + int(y * TILE_PX)))
        assert isinstance(found, tuple)
        return found

    for tile, name in enumerate(("0_0.png", "0_1.png")):
        with Image.open(tmp_path / "rows" / "images" / name) as image:
            assert pixel(tile, 1 / 6, 1 / 6) == image.convert("RGB").getpixel((14, 14))
    left, right, neutral = pixel(2, 0.25, 0.5), pixel(2, 0.75, 0.5), pixel(3, 0.25, 0.5)
    assert left[0] > left[2]
    assert right[2] > right[0]
    assert max(neutral) - min(neutral) <= 1
