"""A loss that is not finite on one of two ranks: the step is skipped on both, and its samples are named."""

import json
from pathlib import Path

import golden_set
import launching
import pytest
import worker

SHAPE = {"model": golden_set.MODEL, "deepspeed_config": "zero3.json", "stage": "stage1"}


def test_a_step_is_skipped_on_all_ranks_and_the_run_continues(tmp_path: Path) -> None:
    """Step 2 has a spoiled sample in the second micro-batch of rank 1; the losses after it are those without step 2."""
    case = {"name": "spoiled", "steps": 4, "accumulation": 2, "spoiled": [[1, 3]], **SHAPE}
    with launching.start(2, [case], tmp_path, main=worker.main, log=tmp_path / "log") as ranks:
        log = ranks.finish(timeout_s=300)
    records = [json.loads(line) for line in (tmp_path / "spoiled" / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert [record["loss"] is None for record in records] == [False, True, False, False]
    (bad,) = (json.loads(line) for line in (tmp_path / "spoiled" / "bad_batches.jsonl").read_text().splitlines())
    key = worker.Case(**case).samples(1, 4)[3].key
    assert bad == {"step": 2, "positions": [4 + 3], "rank": 1, "keys": [key], "loss": None}
    assert f"skipped: loss or gradient not finite ({key})" in log


@pytest.mark.parametrize(
    ("spoiled", "step", "says"),
    [
        ([[0, 1]], 1, "the run's first loss is not finite (step 1; "),
        ([[1, 0], [3, 0], [4, 1], [5, 0]], 6, "was not finite in 3 steps in a row (up to step 6; "),
    ],
    ids=["first", "three in a row"],
)
def test_the_run_ends_and_says_which_samples(tmp_path: Path, spoiled: list[list[int]], step: int, says: str) -> None:
    case = {"name": "spoiled", "steps": 9, "spoiled": spoiled, **SHAPE}
    with launching.start(2, [case], tmp_path, main=worker.main, log=tmp_path / "log") as ranks:
        assert ranks.wait(timeout_s=300) != 0
    assert says in ranks.log.read_text()
    bad = [json.loads(line) for line in (tmp_path / "spoiled" / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["step"] - 1, line["rank"]) for line in bad] == [tuple(pair) for pair in spoiled]
    assert bad[-1]["step"] == step
