"""A sample that cannot be decoded, met by one of two ranks: `stop` saves first, `skip` is the same after any resume.

Also after one from a SIGKILL.
"""

import json
import time
from pathlib import Path
from typing import Any

import launching
import pytest
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.checkpoint.find import newest_complete
from mirage_ds.data.index import load_index
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import load_manifest
from mirage_ds.hf.preset import write_tiny

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
ROWS, STEPS = 24, 12
BAD_POSITIONS = (2 * 2 + 1, 10 * 2 + 1)  # the steps 3 and 11 of global batches of 2, on rank 1
REPLACED = [0, 0, 1, *[0] * 7, 1, 0]
SKIP = "data.on_fault=skip"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and shards of which two samples are spoiled; the key of the first is in `key`."""
    folder = tmp_path_factory.mktemp("fault")
    rows = write_rows(folder / "rows", ROWS)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=8, maxsize=10**9)
    shards = load_manifest(folder / "shards")
    order, index = Plan(ROWS, shards.digest, 42).samples(0, ROWS), load_index(shards)
    for position in reversed(BAD_POSITIONS):
        entry = index[order[position]]
        path = folder / "shards" / shards.manifest.shards[entry.shard].name
        content = bytearray(path.read_bytes())
        content[entry.offset : entry.offset + 5] = b"wrong"
        path.write_bytes(content)
        (folder / "key").write_text(f"{path.name}/{entry.key}")
    return folder


@pytest.fixture(scope="module")
def whole(ground: Path) -> str:
    """The log of the run `skip` of two ranks, which skips and is never stopped."""
    with launching.start(2, *command(ground, "skip", SKIP), log=ground / "skip.log") as ranks:
        return ranks.finish(timeout_s=300)


def command(ground: Path, name: str, *more: str) -> list[str]:
    return [
        *(str(RECIPE), f"model.path={ground / 'model'}", f"data.shards={ground / 'shards'}"),
        *(f"run.dir={ground / name}", f"train.max_steps={STEPS}", "train.warmup_steps=1", "run.resume=auto"),
        *("train.gradient_accumulation_steps=null", "train.global_batch_size=2", "data.num_workers=1", *more),
    ]


def records(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def test_stop_saves_and_says_how_to_continue_and_skip_continues(ground: Path, whole: str, tmp_path: Path) -> None:
    """The run that stopped, continued on one rank, has the losses of the run that skipped from its start on two."""
    key = (ground / "key").read_text()
    with launching.start(2, *command(ground, "stop"), log=tmp_path / "stop") as ranks:
        code = ranks.wait(timeout_s=300)
    text = (tmp_path / "stop").read_text()
    assert (code, text.count("error: ")) == (2, 1), text
    assert f"bad checksum ({key})" in text
    assert "the run ends after step 2, which is saved; continue with run.resume=auto" in text
    assert "Traceback" not in text
    assert not (ground / "stop" / "preempted").exists()

    with launching.start(1, *command(ground, "stop", SKIP), log=tmp_path / "continued") as ranks:
        continued = ranks.finish(timeout_s=300)
    assert f"WARNING: rank 1, step 3: damaged shard: bad checksum ({key})" in whole
    assert f"WARNING: rank 0, step 3: damaged shard: bad checksum ({key})" in continued
    expected, got = records(ground / "skip"), records(ground / "stop")
    assert [record["replaced_samples"] for record in expected] == REPLACED
    for ours, reference in zip(got, expected, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert [ours[name] for name in ("step", "position", "replaced_samples")] == [
            reference[name] for name in ("step", "position", "replaced_samples")
        ]


def test_a_run_over_damaged_data_that_was_killed_has_the_losses_of_one_that_was_not(
    ground: Path, whole: str, tmp_path: Path
) -> None:
    """Bit for bit. It meets one of the damaged samples before it is killed, and one after."""
    run, log = ground / "killed", tmp_path / "log"
    arguments = command(ground, "killed", SKIP, "checkpoint.interval=2")
    with launching.start(2, *arguments, log=log) as ranks:
        while newest_complete(run) is None or len(records(run)) < 3:
            assert ranks.code is None, log.read_text()[-3000:]
            time.sleep(0.01)
        ranks.kill()
    newest = newest_complete(run)
    with launching.start(2, *arguments, log=log) as ranks:
        assert f"Resuming from {newest}" in ranks.finish(timeout_s=300)
    names = ("step", "position", "replaced_samples", "loss_hex")
    expected, got = ([[record[name] for name in names] for record in records(path)] for path in (ground / "skip", run))
    assert got == expected
    assert [record[2] for record in got] == REPLACED
