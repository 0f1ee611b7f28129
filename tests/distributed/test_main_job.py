"""The README's main job, its commands as written: rows to shards to both stages, under the real launcher, 2 ranks.

On the reference's own rows where MIRAGE_VSP_DIR names them, and always on rows of the same kind that are drawn.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from main_job import main_job, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText


@pytest.fixture(scope="module", params=["drawn", pytest.param("real", marks=pytest.mark.slow)])
def job(request: pytest.FixtureRequest, shared: Path) -> Path:
    """The folder in which the main job ran."""
    if request.param == "real" and "MIRAGE_VSP_DIR" not in os.environ:
        pytest.skip("MIRAGE_VSP_DIR does not name the reference's own rows, which have no licence to be shipped")
    return main_job(shared, drawn=request.param == "drawn")


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_losses_fall(job: Path, stage: str) -> None:
    run_dir = job / "runs" / f"tiny-{stage}"
    steps = records(run_dir)
    assert [record["step"] for record in steps] == list(range(1, 21))
    losses = [record["loss"] for record in steps]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert all(float.fromhex(record["loss_hex"]) == record["loss"] for record in steps)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_tensorboard_has_the_same_numbers(job: Path, stage: str) -> None:
    run_dir = job / "runs" / f"tiny-{stage}"
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in records(run_dir)]
    assert ("train/cosine" in events.Tags()["scalars"]) == (stage == "stage1")


PARTS = ("tower_s", "forward_s", "backward_s", "optimizer_s")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_a_step_took_and_computed(job: Path, stage: str) -> None:
    """In metrics.jsonl and TensorBoard; a CPU has no peak rate and no memory of its own."""
    run_dir = job / "runs" / f"tiny-{stage}"
    steps = records(run_dir)
    for record in steps:
        assert all(record[part] > 0 for part in PARTS)
        assert record["save_s"] == 0  # at the end only, after the last step
        assert record["tokens_per_s"] == pytest.approx(2 * record["tokens_per_s_per_gpu"])
        assert record["flops"] > 0
        assert record["mfu_pct"] is record["max_allocated_gib"] is None
    # Parts do not overlap. They are means over the ranks, whose steps begin at other moments: so over all steps.
    parts_s = sum(record[part] for record in steps for part in (*PARTS, "data_s"))
    assert parts_s < sum(record["step_s"] for record in steps)
    counted = [sum(record["step_s"] for record in steps[: number + 1]) for number in range(len(steps))]
    assert [record["counted_s"] for record in steps] == pytest.approx(counted)
    assert 0 < steps[0]["goodput_pct"] < steps[-1]["goodput_pct"] < 100
    began = json.loads((run_dir / "first_start.json").read_text())["time"]
    assert {record["first_start"] for record in steps} == {began}
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = {f"time/{part}" for part in (*PARTS, "data_s", "save_s")}
    tags |= {"throughput/tokens_per_s_per_gpu", "throughput/goodput_pct"}
    assert tags <= set(events.Tags()["scalars"])


def test_the_log_says_what_is_gathered_and_how_latents_are_pooled(job: Path) -> None:
    log = (job / "log").read_text()
    assert "latent_pool: plain torch on cpu" in log
    assert "Gathers the decoder layer by layer, with prefetch (model.gather=layer): about" in log
    assert "Gathers the decoder as one, while the tower runs, whatever K (model.gather=rollout): about" in log


def test_the_trained_model_answers(job: Path) -> None:
    """One question in the terminal, and a file of them, by the exported model."""
    rows = 10 if job.name.endswith("real") else 8
    results = [json.loads(line) for line in (job / "runs" / "tiny-results.jsonl").read_text().splitlines()]
    assert len(results) == rows
    assert re.search(rf"all rows: {rows}\W", (job / "log").read_text())
    AutoModelForImageTextToText.from_pretrained(job / "runs" / "tiny-mirage")


def masters(run_dir: Path) -> list[torch.Tensor]:
    """The float32 masters in a run's last checkpoint, rank by rank."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
    files = sorted(folder.glob("*_optim_states.pt"))
    assert len(files) == 2
    states = [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]
    return [torch.cat([group.flatten() for group in state["fp32_flat_groups"]]) for state in states]


def test_stage_2_starts_from_the_masters_of_stage_1(job: Path) -> None:
    """One step at a rate that changes nothing, started by torchrun: what it saves is what stage 1 saved."""
    if job.name.endswith("real"):
        pytest.skip("the same on the drawn rows")
    still = "train.max_steps=1 train.warmup_steps=0 train.lr=1e-30 run.dir=runs/still"
    run(
        f"torchrun --nproc-per-node 2 --master-port {launching.free_port()} -m mirage_ds.train "
        f"launch/recipes/tiny-stage2.yaml {still}",
        job,
    )
    for before, after in zip(masters(job / "runs" / "tiny-stage1"), masters(job / "runs" / "still"), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(masters(job / "runs" / "tiny-stage1")[0], masters(job / "runs" / "tiny-stage2")[0])
