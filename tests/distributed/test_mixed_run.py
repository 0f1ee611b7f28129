"""A run over two folders of shards: resumed on another number of ranks it has the same samples, and the losses of each
set are those of its samples alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.folders import load_folders
from mirage_ds.data.mixture import order_of
from mirage_ds.data.stream import FoldersReader
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.recipe import load_config

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
G, STEPS = 4, 5  # an epoch has 12 + 3 positions, so that the fourth step lies in two


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    rows = write_rows(folder / "rows", 12)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "maps", maxcount=4, maxsize=10**9)
    build(write_rows(folder / "other_rows", 6), folder / "puzzles", maxcount=3, maxsize=10**9)
    return folder


def command(ground: Path, name: str, *more: str) -> list[str]:
    sets = [{"path": str(ground / "maps")}, {"path": str(ground / "puzzles"), "weight": 0.5}]
    return [
        *(str(RECIPE), f"model.path={ground / 'model'}", f"data.shards={json.dumps(sets)}", "run.resume=auto"),
        *(f"run.dir={ground / name}", f"train.max_steps={STEPS}", "train.warmup_steps=1", "data.shuffle=window"),
        *("train.gradient_accumulation_steps=null", f"train.global_batch_size={G}", "data.num_workers=1", *more),
        *("data.shuffle_window=2", f"model.cache_targets={ground / 'targets'}", "checkpoint.interval=2"),
        "checkpoint.keep_latest_k=5",
    ]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_losses(ground: Path) -> dict[str, dict[str, float]]:
    """Of the first step, from each of its samples by itself in one process."""
    config = load_config(RECIPE, command(ground, "two")[1:])
    shards = load_folders(config.data)
    encoder = load_encoder(config.model.path, stage="stage1", latent_size=config.model.latent_size)
    backbone = load_backbone(config.model.path, dtype=torch.float32)
    model = MirageModel(backbone, stage="stage1", ce_loss_weight=config.train.text_weight)
    sums = {name: {"ce_loss": 0.0, "latent_loss": 0.0, "samples": 0} for name in shards.names}
    read = FoldersReader(shards)
    for number in order_of(config, shards).samples(0, G):
        sample = read(number)
        with torch.no_grad():
            losses = model(collate([replace(encoder(sample), set_number=0)], align_latents=False))
        own = sums[shards.names[sample.set_number]]
        own["ce_loss"] += losses.ce_loss.item()
        own["latent_loss"] += losses.latent_loss.item()
        own["samples"] += 1
    for own in sums.values():
        own["ce_loss"], own["latent_loss"] = (own[name] / own["samples"] for name in ("ce_loss", "latent_loss"))
    return sums


def test_a_mixture_is_the_same_on_other_ranks_and_after_a_resume(ground: Path, tmp_path: Path) -> None:
    with launching.start(2, *command(ground, "two"), log=tmp_path / "two") as ranks:
        log = ranks.finish(timeout_s=300)
    assert "18 samples in 2 sets (maps 12 x 1, puzzles 6 x 0.5), 15 in an epoch, shuffled in windows of 2 shards" in log
    whole = records(ground / "two")
    expected = first_losses(ground)
    for name, losses in whole[0]["sets"].items():
        assert losses == pytest.approx(expected[name], rel=1e-4)
    for record in whole:
        for loss in ("ce_loss", "latent_loss"):
            total = sum(each["samples"] * (each[loss] or 0) for each in record["sets"].values())
            assert total / G == pytest.approx(record[loss], rel=1e-5)
    config = load_config(RECIPE, command(ground, "two")[1:])
    order = order_of(config, load_folders(config.data))
    taken = [sum(number >= 12 for number in order.samples(G * step, G)) for step in range(STEPS)]
    assert [record["sets"]["puzzles"]["samples"] for record in whole] == taken

    shutil.copytree(ground / "two", ground / "cut")
    for step in (4, STEPS):
        shutil.rmtree(ground / "cut" / "checkpoints" / f"global_step{step}")
    with launching.start(1, *command(ground, "cut"), log=tmp_path / "cut") as ranks:
        assert "global_step2" in ranks.finish(timeout_s=300)
    for ours, reference in zip(records(ground / "cut"), whole, strict=True):
        assert ours["position"] == reference["position"]
        for name, losses in reference["sets"].items():
            for loss, value in losses.items():
                assert ours["sets"][name][loss] == (None if value is None else pytest.approx(value, rel=1e-4))
