"""A sample that cannot be decoded, met by one of two ranks: `stop` saves first, `skip` is the same after any resume."""

import json
from pathlib import Path
from typing import Any

import launching
import pytest
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.data.index import load_index
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import load_manifest
from mirage_ds.hf.preset import write_tiny

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
STEPS, BAD_POSITION = 6, 2 * 2 + 1  # the third step of global batches of 2, on rank 1


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and shards of which one sample is spoiled; its key is in `key`."""
    folder = tmp_path_factory.mktemp("fault")
    rows = write_rows(folder / "rows", 20)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=8, maxsize=10**9)
    shards = load_manifest(folder / "shards")
    entry = load_index(shards)[Plan(20, shards.digest, 42).samples(BAD_POSITION, 1)[0]]
    path = folder / "shards" / shards.manifest.shards[entry.shard].name
    content = bytearray(path.read_bytes())
    content[entry.offset : entry.offset + 5] = b"wrong"
    path.write_bytes(content)
    (folder / "key").write_text(f"{path.name}/{entry.key}")
    return folder


def command(ground: Path, name: str, *more: str) -> list[str]:
    return [
        *(str(RECIPE), f"model.path={ground / 'model'}", f"data.shards={ground / 'shards'}"),
        *(f"run.dir={ground / name}", f"train.max_steps={STEPS}", "train.warmup_steps=1", "run.resume=auto"),
        *("train.gradient_accumulation_steps=null", "train.global_batch_size=2", "data.num_workers=1", *more),
    ]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_stop_saves_and_says_how_to_continue_and_skip_continues(ground: Path, tmp_path: Path) -> None:
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

    skip = "data.on_fault=skip"
    with launching.start(1, *command(ground, "stop", skip), log=tmp_path / "continued") as ranks:
        continued = ranks.finish(timeout_s=300)
    with launching.start(2, *command(ground, "skip", skip), log=tmp_path / "skip") as ranks:
        whole = ranks.finish(timeout_s=300)
    assert f"WARNING: rank 1, step 3: damaged shard: bad checksum ({key})" in whole
    assert f"WARNING: rank 0, step 3: damaged shard: bad checksum ({key})" in continued
    expected, got = records(ground / "skip"), records(ground / "stop")
    assert [record["replaced_samples"] for record in expected] == [0, 0, 1, 0, 0, 0]
    for ours, reference in zip(got, expected, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert [ours[name] for name in ("step", "position", "replaced_samples")] == [
            reference[name] for name in ("step", "position", "replaced_samples")
        ]
