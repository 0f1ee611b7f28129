"""Runs that keep their latent targets, on two ranks and on one, against a run that encodes them in every epoch."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.hf.preset import write_tiny

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
SAMPLES, STEPS = 8, 10  # two epochs and a half, in global batches of 2


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    rows = write_rows(folder / "rows", SAMPLES)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return folder


def train(ground: Path, name: str, ranks: int, *more: str) -> tuple[str, list[dict[str, Any]]]:
    """The output and the records of a run."""
    command = [
        *(str(RECIPE), f"model.path={ground / 'model'}", f"data.shards={ground / 'shards'}"),
        *(f"run.dir={ground / name}", f"train.max_steps={STEPS}", "train.warmup_steps=1"),
        *("train.gradient_accumulation_steps=null", "train.global_batch_size=2", "data.num_workers=1", *more),
    ]
    with launching.start(ranks, *command, log=ground / f"{name}.log") as started:
        output = started.finish(timeout_s=300)
    return output, [json.loads(line) for line in (ground / name / "metrics.jsonl").read_text().splitlines()]


def test_the_losses_of_a_run_that_encodes_all(ground: Path) -> None:
    """The run on one rank, with micro-batches of 2, finds all targets that the run on two ranks has kept."""
    folder = ground / "kept"
    _, expected = train(ground, "encoded", 2)
    output, filling = train(ground, "filling", 2, f"model.cache_targets={folder}")
    (file,) = folder.glob("*.targets")
    assert f"Keeps the latent targets of {SAMPLES} of {SAMPLES} helper images: {file}, at most 0.00 GiB" in output
    kept = file.read_bytes()
    slot_bytes, rest = divmod(len(kept), SAMPLES)
    assert rest == 0
    assert all(any(kept[start : start + slot_bytes]) for start in range(0, len(kept), slot_bytes))
    _, finding = train(ground, "finding", 1, f"model.cache_targets={folder}", "train.micro_batch_size_per_gpu=2")
    assert list(folder.glob("*.targets")) == [file]  # the tower's digest does not depend on the number of ranks
    assert file.read_bytes() == kept
    for records in (filling, finding):
        for ours, reference in zip(records, expected, strict=True):
            for name in ("loss", "ce_loss", "latent_loss"):
                assert ours[name] == pytest.approx(reference[name], rel=1e-5), ours["step"]
            assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    for ours, reference in zip(finding, expected, strict=True):
        assert ours["flops"] < reference["flops"], ours["step"]  # no helper image went through the tower
