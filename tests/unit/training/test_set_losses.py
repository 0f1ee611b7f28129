"""Losses of each data set of a mixture: against the loss of each sample alone, for every way to cut a batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.packing import collate_packed
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.set_losses import SetLosses
from mirage_ds.training.step_sums import StepSums
from mirage_ds.zero3 import distributed

SETS = [0, 1, 0, 2, 1, 0]  # of six samples; set 3 has none


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[MirageModel, list[EncodedSample]]:
    folder = tmp_path_factory.mktemp("sets")
    rows = write_rows(folder / "rows", len(SETS))
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    encoder = load_encoder(str(folder / "model"), stage="stage1", latent_size=2)
    read = SampleReader(load_manifest(folder / "shards"))
    samples = [replace(encoder(read(number)), set_number=which) for number, which in enumerate(SETS)]
    model = MirageModel(load_backbone(str(folder / "model"), dtype=torch.float32), stage="stage1", ce_loss_weight=0.1)
    return model, samples


def padded(samples: list[EncodedSample]) -> Batch:
    return collate(samples, align_latents=False)


@pytest.fixture
def alone(ground: tuple[MirageModel, list[EncodedSample]]) -> torch.Tensor:
    """[sets, 3]: text loss, latent loss and number of samples, from each sample by itself."""
    model, samples = ground
    found = torch.zeros(4, 3)
    with torch.no_grad():
        for sample in samples:
            losses = model(padded([sample]))
            found[sample.set_number] += torch.stack([losses.ce_loss, losses.latent_loss, torch.tensor(1.0)])
    return found


@pytest.mark.parametrize("cut", [[6], [1, 2, 3], [2, 2, 2]])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_are_those_of_single_samples(
    ground: tuple[MirageModel, list[EncodedSample]], alone: torch.Tensor, cut: list[int], packed: bool
) -> None:
    model, samples = ground
    sets = SetLosses(["a", "b", "c", "d"], torch.device("cpu"))
    model.keep_losses = sets.add
    try:
        with torch.no_grad():
            model(padded(samples))  # of a dry run: no step is under way
            for _ in range(2):  # the second step has no part of the first
                sets.begin()
                whole, remaining = torch.zeros(2), iter(samples)
                for size in cut:
                    batch = [next(remaining) for _ in range(size)]
                    losses = model(collate_packed(batch) if packed else padded(batch))
                    whole += torch.stack([losses.ce_loss, losses.latent_loss])
                found = sets.take()
                model(padded(samples))  # of a validation
    finally:
        model.keep_losses = None
    assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[:, :2].sum(dim=0), whole, rtol=1e-5)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two ranks with the same sums: a mean over the set's samples in the step; the curves are over all steps since
    the last point, as a step may have no sample of a set."""
    for name, value in {"world_size": 2, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: 2 * values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value] * 2)
    sets = SetLosses(["maps", "puzzles"], torch.device("cpu"))
    metrics = Metrics(tmp_path, stage="stage1", global_batch_size=4, max_steps=2, log_freq=2, sets=sets)
    points: dict[str, float] = {}
    monkeypatch.setattr(metrics.report.curves, "add", lambda values, step: points.update(values))  # type: ignore[union-attr]
    for number, sums in enumerate([[[6.0, 1.0, 2.0], [0.0, 0.0, 0.0]], [[1.0, 0.5, 1.0], [4.0, 0.25, 1.0]]], 1):
        metrics.begin(number)
        sets.sums += torch.tensor(sums)
        losses = torch.tensor([1.0, sum(each[0] for each in sums), sum(each[1] for each in sums)])
        metrics.add(StepSums(number, 4 * number, losses, 2, 50, 60, 1e-4, 0.5, 0, float(number)))
    metrics.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["sets"] == {
        "maps": {"ce_loss": 3.0, "latent_loss": 0.5, "samples": 4},
        "puzzles": {"ce_loss": None, "latent_loss": None, "samples": 0},
    }
    assert second["sets"]["puzzles"] == {"ce_loss": 4.0, "latent_loss": 0.25, "samples": 2}
    assert first["ce_loss"] == 3.0
    assert second["ce_loss"] == 2.5
    found = {tag: value for tag, value in points.items() if "sets" in tag}
    assert found == {
        "train_sets/ce_loss/maps": pytest.approx(7 / 3),
        "train_sets/ce_loss/puzzles": 4.0,
        "train_sets/latent_loss/maps": 0.5,
        "train_sets/latent_loss/puzzles": 0.25,
    }
    assert "step     2/2" in capsys.readouterr().out
