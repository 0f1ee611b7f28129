"""A killed run resumes with the same bits as an uninterrupted one: on 2 ranks, with real SIGKILLs.

Stage 1 is a control arm, whose rows get other rows' helper images, and a share of which has hidden images.
"""

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import launching
import plain_loop
import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.checkpoint.find import newest_complete
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.helpers import OWN, Helpers
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL, KILLED_AFTER = 11, 5, 6
CONTROLS = {"stage1": ("data.helper=shuffled", "data.text_dropout_image=0.3"), "stage2": ()}
HELPERS = {"stage1": Helpers("shuffled", seed=42), "stage2": OWN}  # with the default of run.seed


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and shards."""
    folder = tmp_path_factory.mktemp("resume")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return folder


def command(ground: Path, stage: str, name: str, *more: str) -> list[str]:
    return [
        str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml"),
        f"train.stage={stage}",
        f"model.path={ground / 'model'}",
        f"data.shards={ground / 'shards'}",
        f"run.dir={ground / name}",
        f"train.max_steps={STEPS}",
        f"checkpoint.interval={INTERVAL}",
        f"evaluation.shards={ground / 'shards'}",
        f"evaluation.interval={INTERVAL}",
        "evaluation.max_samples=5",
        f"train.log_freq={3 if 'killed' in name else 1}",
        *CONTROLS[stage],
        *more,
    ]


def records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_step(ranks: launching.Ranks, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not any(record["step"] >= step for record in records(metrics)):
        assert ranks.code is None, ranks.log.read_text()[-3000:]
        assert time.monotonic() < deadline, ranks.log.read_text()[-3000:]
        time.sleep(0.05)


def final_weights(run_dir: Path) -> str:
    """sha256 of the float32 masters and the optimizer's moments in the last checkpoint."""
    digest = hashlib.sha256()
    for file in sorted((run_dir / "checkpoints" / f"global_step{STEPS}").glob("*_optim_states.pt")):
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        moments = [value for group in state["optimizer_state_dict"]["state"].values() for value in group.values()]
        for tensor in [*state["fp32_flat_groups"], *moments]:
            digest.update(torch.as_tensor(tensor).detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def whole(ground: Path) -> Callable[[str], Path]:
    """The folder of the run of a stage that was never stopped."""

    @cache
    def run(stage: str) -> Path:
        more = ("train.deterministic=true", "train.profile_steps=[2, 3]")
        name = f"{stage}-whole"
        with launching.start(2, *command(ground, stage, name, *more), log=ground / f"{name}.log") as ranks:
            ranks.finish(timeout_s=800)
        return ground / name

    return run


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_and_resumed_is_the_run_that_was_never_stopped(
    ground: Path, whole: Callable[[str], Path], stage: str
) -> None:
    killed = f"{stage}-killed"
    log = ground / f"{stage}.log"
    with launching.start(2, *command(ground, stage, killed, "run.resume=auto"), log=log) as stopped:
        wait_for_step(stopped, ground / killed / "metrics.jsonl", KILLED_AFTER)
        while newest_complete(ground / killed) is None:  # written in the background
            assert stopped.code is None, log.read_text()[-3000:]
            time.sleep(0.01)
        stopped.kill()
    newest = newest_complete(ground / killed)
    more = ("run.resume=auto", "data.num_workers=0")
    with launching.start(2, *command(ground, stage, killed, *more), log=log) as again:
        text = again.finish(timeout_s=800)
    assert f"Resuming from {newest}" in text
    assert "changed since the last start: data.num_workers: 1 -> 0" in text

    expected, got = (records(run / "metrics.jsonl") for run in (whole(stage), ground / killed))
    assert [record["step"] for record in got] == list(range(1, STEPS + 1))
    for ours, reference in zip(got, expected, strict=True):
        assert (ours["loss_hex"], ours["position"]) == (reference["loss_hex"], reference["position"])
    assert records(ground / killed / "validation.jsonl") == records(whole(stage) / "validation.jsonl")
    assert final_weights(ground / killed) == final_weights(whole(stage))


def test_a_signal_to_one_rank_saves_all(ground: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """SIGUSR1 to rank 1 alone, SIGTERM to both while they save; the resumed run has the same bits."""
    run_dir, log = ground / "stage1-asked", tmp_path / "log"
    arguments = command(ground, "stage1", "stage1-asked", "run.resume=auto", "checkpoint.interval=0")
    with launching.start(2, *arguments, log=log) as asked:
        wait_for_step(asked, run_dir / "metrics.jsonl", 3)
        os.kill(asked.processes[1].pid, signal.SIGUSR1)
        while "rank 1: SIGUSR1" not in log.read_text():  # else rank 0, which gets SIGTERM below, may be the first
            assert asked.code is None, log.read_text()[-3000:]
            time.sleep(0.05)
        while asked.code is None:  # repeatedly, until everything is saved and the ranks have ended
            asked.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        text = asked.finish(timeout_s=800)
    step = json.loads((run_dir / "preempted").read_text())["step"]
    assert 3 <= step < STEPS
    assert f"rank 1: SIGUSR1: saving and ending after step {step}" in text
    assert (run_dir / "checkpoints" / "latest").read_text() == f"global_step{step}"
    for number in (0, 1):
        beat = json.loads((run_dir / "heartbeat" / f"rank_{number}").read_text())
        assert (beat["step"], beat["host"]) == (step, socket.gethostname())

    with launching.start(2, *arguments, log=log) as again:
        again.finish(timeout_s=800)
    assert not (run_dir / "preempted").exists()
    expected, got = (records(run / "metrics.jsonl") for run in (whole("stage1"), run_dir))
    assert [record["loss_hex"] for record in got] == [record["loss_hex"] for record in expected]
    assert final_weights(run_dir) == final_weights(whole("stage1"))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_validation_loss_is_that_of_the_saved_weights(
    ground: Path, whole: Callable[[str], Path], stage: str, tmp_path: Path
) -> None:
    """The weights of the last checkpoint in plain transformers, sample by sample, in the independent loop."""
    run_dir = whole(stage)
    export_checkpoint(run_dir, tmp_path / "model")
    backbone = load_backbone(str(tmp_path / "model"), dtype=torch.float32)
    encoder = load_encoder(str(ground / "model"), stage=stage, latent_size=4)
    read = SampleReader(load_manifest(ground / "shards"), helpers=HELPERS[stage])
    with torch.no_grad():
        losses = [
            plain_loop.sample_losses(backbone.hf, vars(encoder(read(number))), stage) for number in (0, 2, 4, 6, 8)
        ]
    last = records(run_dir / "validation.jsonl")[-1]
    assert last["step"] == STEPS
    assert last["ce_loss"] == pytest.approx(sum(ce.item() for ce, _ in losses) / 5, rel=1e-4)
    assert last["latent_loss"] == pytest.approx(sum(latent.item() for _, latent in losses) / 5, rel=1e-4)


def test_the_profiler_writes_the_configured_steps(whole: Callable[[str], Path]) -> None:
    for rank in (0, 1):
        trace = json.loads((whole("stage2") / "profile" / f"rank_{rank}.json").read_text())
        steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}
        assert len(steps) == 2


def test_a_finished_run_is_extended(ground: Path, tmp_path: Path) -> None:
    """With a constant learning rate it is the longer run, bit for bit; its position is exact."""
    outcomes = []
    for name, lengths in {"long": (8,), "extended": (4, 8)}.items():
        for steps in lengths:
            more = ("train.lr_decay=constant", f"train.max_steps={steps}", "evaluation.shards=null")
            if steps != lengths[0]:
                more += ("run.resume=extend",)
            arguments = command(ground, "stage1", name, "checkpoint.interval=0", *more)
            with launching.start(1, *arguments, log=tmp_path / name) as run:
                output = run.finish(timeout_s=800)
        got = records(ground / name / "metrics.jsonl")
        outcomes.append([(record["step"], record["position"], record["loss_hex"]) for record in got])
    assert outcomes[0] == outcomes[1]
    assert "extended from 4 to 8 steps: continues with step 5, at sample 8 of the order" in output


def test_a_change_of_the_mathematics_is_refused(ground: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """On every rank, with one message; more changes: tests/unit/training/test_run_folder.py."""
    log = tmp_path / "log"
    more = ("run.resume=auto", "train.lr=0.5")
    with launching.start(2, *command(ground, "stage1", whole("stage1").name, *more), log=log) as ranks:
        assert ranks.wait(timeout_s=600) == 2
    text = log.read_text()
    assert text.count("train.lr: 0.001 -> 0.5") == 1
    assert "Traceback" not in text
