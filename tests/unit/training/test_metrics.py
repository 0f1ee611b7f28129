"""What one rank reports of its steps: on the console, in metrics.jsonl and in TensorBoard."""

import dataclasses
import errno
import gc
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mirage_ds.training import step_sums
from mirage_ds.training.latent_sums import LatentFigures, LatentSums
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.planned import Planned
from mirage_ds.training.report import ALIKE_IN_ROW, Evaluated
from mirage_ds.training.slow_rank import WINDOW_STEPS
from mirage_ds.training.step_clock import StepTimes
from mirage_ds.training.step_sums import StepSums
from mirage_ds.zero3 import distributed

LOSSES = {"loss": 1.6, "ce_loss": 6.0, "latent_loss": 1.0}
GLOBAL_BATCH_SIZE = 2


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"world_size": 1, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time.monotonic() says."""
    gc.collect()  # now: the data workers of an earlier test would be waited for by a clock that stands still
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def make(
    run_dir: Path,
    stage: str,
    max_steps: int = 100,
    steps_done: int = 0,
    log_freq: int = 1,
    planned: Planned | None = None,
) -> Metrics:
    return Metrics(
        run_dir,
        stage=stage,
        global_batch_size=GLOBAL_BATCH_SIZE,
        max_steps=max_steps,
        log_freq=log_freq,
        steps_done=steps_done,
        planned=planned,
    )


def step(number: int, started_s: float = 0.0, skipped_steps: int = 0) -> StepSums:
    return StepSums(
        step=number,
        position=number * GLOBAL_BATCH_SIZE,
        losses=torch.tensor(list(LOSSES.values())) * GLOBAL_BATCH_SIZE,
        num_grounded_samples=GLOBAL_BATCH_SIZE,
        num_tokens=100,
        num_cells=125,
        lr=1e-4,
        grad_norm=0.5,
        skipped_steps=skipped_steps,
        started_s=started_s,
    )


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("text", "text 6.0000 | lr"),
        ("stage1", "text 6.0000 | latent 1.0000 | loss 1.6000 | lr"),
        ("stage2", "text 6.0000 | lr"),
    ],
)
def test_the_console_shows_the_losses_of_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, words: str
) -> None:
    """The text loss, which compares between stages, comes first; a validation's line has the same losses."""
    metrics = make(tmp_path, stage)
    metrics.add(step(1))
    metrics.add_validation(1, LOSSES)
    metrics.close()
    line, validation = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step     1/100 | {words} 1.00e-04 | grad norm 0.500 | ")
    assert validation == f"step     1/100 | validation {words.removesuffix(' | lr')}"


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_files_of_a_stage(tmp_path: Path, stage: str) -> None:
    """metrics.jsonl and validation.jsonl have every loss; TensorBoard draws no curve of a loss that is not there."""
    metrics = make(tmp_path, stage)
    metrics.add(step(1))
    metrics.add_validation(1, LOSSES)
    metrics.close()
    for name in ("metrics.jsonl", "validation.jsonl"):
        record = json.loads((tmp_path / name).read_text())
        assert {key: record[key] for key in LOSSES} == pytest.approx(LOSSES)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "train/ce_loss", "validation/loss", "validation/ce_loss"}
    latent_tags = {"train/latent_loss", "validation/latent_loss"}
    assert tags & latent_tags == (latent_tags if stage == "stage1" else set())


@pytest.fixture
def time_left(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str | None]]:
    """Trains steps of these seconds; what each line on the console says of the time that is left."""

    def train(durations_s: list[float], max_steps: int, **more: int) -> list[str | None]:
        metrics = make(tmp_path, "text", max_steps, **more)
        for number, duration_s in enumerate(durations_s, start=more.get("steps_done", 0) + 1):
            started_s = clock[0]
            clock[0] += duration_s
            metrics.add(step(number, started_s))
        metrics.close()
        found = [re.search(r"\| (\S+|\S+ \S+) left$", line) for line in capsys.readouterr().out.splitlines()]
        return [match and match[1] for match in found]

    return train


def test_the_time_left_comes_from_recent_steps(time_left: Callable[..., list[str | None]]) -> None:
    """Not from the first, slow one, nor from one that was slow in between; after the last step nothing is left."""
    assert time_left([60.0, 2.0, 2.0, 30.0, 2.0, 2.0], max_steps=6) == [None, "8s", "6s", "4s", "2s", None]


def test_the_time_left_follows_a_run_that_slows_down(time_left: Callable[..., list[str | None]]) -> None:
    lines = time_left([9.0] + [1.0] * 100 + [10.0] * 50, max_steps=1000)
    assert lines[100] == "14m 59s"  # 899 steps of 1 s
    assert lines[150] == "2h 21m"  # 849 steps of 10 s


def test_the_time_left_of_a_resumed_run(time_left: Callable[..., list[str | None]]) -> None:
    """The first step after the start is the slow one, whatever its number."""
    assert time_left([60.0, 2.0], max_steps=100, steps_done=40) == [None, "1m 56s"]


def test_the_time_left_counts_every_step_between_two_lines(time_left: Callable[..., list[str | None]]) -> None:
    assert time_left([60.0, 1.0, 2.0, 3.0], max_steps=100, log_freq=2) == ["1m 38s", "3m 12s"]


def test_skipped_steps_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make(tmp_path, "text")
    metrics.add(step(1, skipped_steps=3))
    metrics.close()
    assert capsys.readouterr().out.endswith(" | 3 steps skipped: gradient not finite\n")


def test_a_resumed_run_drops_the_records_after_its_checkpoint(tmp_path: Path) -> None:
    first = make(tmp_path, "text")
    for number in (1, 2, 3):
        first.add(step(number))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    again = make(tmp_path, "text", steps_done=2)
    again.add(step(3))
    again.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_a_run_that_starts_over_keeps_what_the_failed_start_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(tmp_path, "text")
    first.add(step(1))
    first.close()
    old = (tmp_path / "metrics.jsonl").read_text()
    make(tmp_path, "text").close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    (kept,) = tmp_path.glob("metrics.*.jsonl")
    assert kept.read_text() == old
    assert f"{kept.name}: what metrics.jsonl had of an earlier start" in capsys.readouterr().out


def test_bad_lines_are_dropped_with_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a full disk, a lost node or an editor leaves them."""
    good = [f'{{"step": {number}}}\n'.encode() for number in (1, 2, 3)]
    lines = [good[0], b"\0\0\xff\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": 1, \n', good[1], good[2], b'{"step": 2']
    for name in ("metrics.jsonl", "validation.jsonl"):
        (tmp_path / name).write_bytes(b"".join(lines))
    make(tmp_path, "text", steps_done=2).close()
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == good[0] + good[1]
    said = capfd.readouterr().err
    assert said.count("which are dropped: 2, 3, 4, 5\n") == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, on which no byte fits")
def test_a_full_disk_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = make(tmp_path, "text")
    metrics.report.steps.file = Path("/dev/full").open("w")  # noqa: SIM115 (metrics closes it)
    for number in (1, 2):
        metrics.add(step(number))
    metrics.close()
    said = capfd.readouterr()
    assert said.err.count(f"WARNING: lines are missing ({tmp_path / 'metrics.jsonl'}): No space left on device") == 1
    assert said.out.count(" | text ") == 2


@pytest.mark.parametrize("where", ["tensorboard", "tensorboard, later"])
def test_without_curves_the_run_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "tensorboard":
        (tmp_path / "tensorboard").touch()  # a file: no folder can be made
    metrics = make(tmp_path, "text")
    if where != "tensorboard":

        def refuse(*point: object) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(metrics.report.curves.writer.file_writer, "add_summary", refuse)
    for number in (1, 2):
        metrics.add(step(number))
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capfd.readouterr().err.count("WARNING: no more curves are written") == 1


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = make(tmp_path, "text")
    metrics.add(dataclasses.replace(step(1), grad_norm=float("inf"), losses=torch.tensor([float("nan")] * 3)))
    metrics.add_validation(1, dict.fromkeys(LOSSES, float("nan")))
    metrics.close()
    for name, keys in {"metrics.jsonl": (*LOSSES, "grad_norm"), "validation.jsonl": tuple(LOSSES)}.items():
        record = json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        assert [record[key] for key in keys] == [None] * len(keys)


GPU_FIGURES = ("mfu_pct", "max_allocated_gib", "max_reserved_gib", "planned_gib")
GPU_TAGS = {"throughput/mfu_pct", "memory/max_allocated_gib", "memory/max_reserved_gib", "memory/planned_gib"}


def tags_of(run_dir: Path) -> set[str]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_figures_of_a_gpu(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 6e12 FLOPs and 100 tokens in 10 s, on a GPU of 2e12 FLOPs per second."""
    monkeypatch.setattr(step_sums.device, "peak_bytes", lambda: (3 * 2**30, 4 * 2**30))
    metrics = make(tmp_path, "text", planned=Planned(None, None, peak_flops=2e12, peak_bytes=5 * 2**30))
    clock[0] += 10
    metrics.add(dataclasses.replace(step(1, clock[0] - 10), flops=6e12))
    metrics.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["flops"] == 6e12
    assert [record[name] for name in GPU_FIGURES] == pytest.approx([30.0, 3.0, 4.0, 5.0])
    assert record["tokens_per_s_per_gpu"] == pytest.approx(10.0)
    assert tags_of(tmp_path) >= GPU_TAGS
    assert " | data 0% | MFU 30.0% | 3.0 GiB (planned 5.0)" in capsys.readouterr().out


def test_how_the_deal_was(tmp_path: Path) -> None:
    """By hand: 100 tokens in 125 columns; the imbalance is the same on every rank, and no sum."""
    metrics = make(tmp_path, "text")
    metrics.add(dataclasses.replace(step(1), imbalance=1.25))
    metrics.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["imbalance"], record["padding_pct"]) == (1.25, pytest.approx(20))
    assert tags_of(tmp_path) >= {"data/imbalance", "data/padding_pct"}


def test_a_cpu_has_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make(tmp_path, "text", planned=Planned(None, None, peak_flops=None, peak_bytes=None))
    metrics.add(dataclasses.replace(step(1), flops=6e12))
    metrics.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["flops"] == 6e12
    assert [record[name] for name in GPU_FIGURES] == [None] * 4
    assert not tags_of(tmp_path) & GPU_TAGS
    assert not re.search("MFU|GiB|goodput", capsys.readouterr().out)


def test_waiting_for_a_save_is_in_no_step_and_on_the_curve(tmp_path: Path, clock: list[float]) -> None:
    """A background save is completed for 4 s between steps 1 and 2, and another one for 3 s between 2 and 3."""
    metrics = make(tmp_path, "text", log_freq=2)
    for number, save_s in enumerate((0.0, 4.0, 3.0, 0.0), start=1):
        clock[0] += 10.0 + save_s
        metrics.add(dataclasses.replace(step(number, clock[0] - 10.0), times=StepTimes(host_s={"save": save_s})))
    metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["save_s"] for record in records] == [0.0, 4.0, 3.0, 0.0]
    assert [record["step_s"] for record in records] == [10.0] * 4
    assert [record["counted_s"] for record in records] == [10.0, 20.0, 30.0, 40.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("time/save_s")] == [(2, 4.0), (4, 3.0)]


class Ranks:
    """Four ranks in one process: each reports in turn, and rank 0, the last one, gets the sum."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.reports = 0, []
        monkeypatch.setattr(distributed, "world_size", lambda: 4)
        monkeypatch.setattr(distributed, "rank", lambda: self.rank)
        monkeypatch.setattr(distributed, "is_main", lambda: self.rank == 0)
        monkeypatch.setattr(distributed, "gather", lambda value: [f"node{rank}" for rank in range(4)])
        monkeypatch.setattr(distributed, "sum_over_ranks", self.sum)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.reports.append(values.clone())
        return values if self.rank else torch.stack(self.reports).sum(0)


def test_a_slow_rank_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """On the console, in the record and as a curve; parts are means over the ranks."""
    ranks = Ranks(monkeypatch)
    for ranks.rank in (3, 2, 1, 0):
        metrics = make(tmp_path, "text", log_freq=WINDOW_STEPS + 1)
        for number in range(1, WINDOW_STEPS + 2):
            tower_s = 100.0 if number == 1 else [0.9, 0.9, 1.4, 0.9][ranks.rank]  # the first step is always slow
            times = StepTimes(host_s={"data": 0.1, "tower": tower_s, "forward": tower_s})
            clock[0] += 4.0
            metrics.add(dataclasses.replace(step(number, clock[0] - 4.0), times=times))
        metrics.close()
    assert "slow rank: 2 on node2 takes 1.50 s a step" in capsys.readouterr().out.splitlines()[-1]
    first, *between, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (last["slowest_rank"], last["slowest_host"]) == (2, "node2")
    assert last["slowest_pct"] == pytest.approx(50)
    assert {record["slowest_pct"] for record in (first, *between)} == {None}
    assert (last["tower_s"], last["data_s"], last["data_pct"]) == pytest.approx((1.025, 0.1, 2.5))
    assert last["tokens_per_s"] == pytest.approx(4 * last["tokens_per_s_per_gpu"]) == pytest.approx(4 * 100 / 4)
    assert "time/slowest_rank_pct" in tags_of(tmp_path)


def test_latent_health_is_written_where_a_step_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curves by slot; one line once rows' latents have been alike for some time, not for a moment."""
    cosines = iter([0.99] * 3 + [0.5] + [0.99] * (2 * ALIKE_IN_ROW))
    metrics = make(tmp_path, "stage2", log_freq=2)
    taken: list[bool] = []

    def take(*, targets: bool) -> LatentFigures:
        taken.append(targets)
        return LatentFigures(
            num_rows=[2, 1],
            norm=[1.5, 2.5],
            row_cosine=[next(cosines), None],
            next_cosine=[0.1, None],
            target_cosine=[None] * 2,
            effective_rank=[1.25, None],
        )

    latents = LatentSums(2, 4, torch.device("cpu"))
    monkeypatch.setattr(latents, "take", take)
    metrics.latents = latents
    for number in range(1, 2 * (4 + 2 * ALIKE_IN_ROW) + 1):
        metrics.begin(number)
        assert latents.active == (number % 2 == 0)
        metrics.add(step(number, started_s=float(number)))
    metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["latents" in record for record in records] == [False, True] * (4 + 2 * ALIKE_IN_ROW)
    assert records[1]["latents"] == {
        "num_rows": [2, 1],
        "norm": [1.5, 2.5],
        "row_cosine": [0.99, None],
        "next_cosine": [0.1, None],
        "target_cosine": [None, None],
        "effective_rank": [1.25, None],
    }
    assert not any(taken)  # stage 2 has no targets
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("latents/")} == {
        "latents/norm_0",
        "latents/norm_1",
        "latents/row_cosine_0",
        "latents/next_cosine_0",
        "latents/effective_rank_0",
    }
    lines = [line for line in capsys.readouterr().out.splitlines() if "are alike" in line]
    assert [line.split("/")[0].split()[-1] for line in lines] == [str(2 * (4 + ALIKE_IN_ROW))]


def test_an_evaluation_says_what_makes_its_rates_mean_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After each evaluation; that rows' latents are alike once in a start."""
    metrics = make(tmp_path, "stage2")
    evaluated = Evaluated({"success": 0.25}, {"row_cosine": 0.99}, [], "the latents are alike", ["all answers are 'C'"])
    for step in (10, 20):
        metrics.add_evaluation(step, evaluated, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1][:21] for line in lines] == [
        "evaluation success 25",
        "all answers are 'C'",
        "the latents are alike",
        "evaluation success 25",
        "all answers are 'C'",
    ]
