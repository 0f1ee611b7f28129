"""The examples of docs/importing.md: each becomes the row that the page shows; all of them build, encode in each
stage, make a step, and are decoded. Losses against the plain loop, which does not use mirage_ds."""

import json
from dataclasses import dataclass
from pathlib import Path

import plain_loop
import pytest
import torch
from imported import import_file
from published_rows import examples, without_digests, write_published

from data_tools.build import build
from data_tools.importing.formats import FORMATS
from mirage_ds.config import Stage
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.rows import read_questions
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference.generate import load_decoder
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel

K = 2
STAGES: tuple[Stage, ...] = ("text", "stage1", "stage2")
FOR_CHOICE_ALONE = ("blink", "vstar", "mmvp", "hrbench")


@dataclass(frozen=True)
class Sets:
    """All examples, imported."""

    rows: dict[str, Path]  # rows.jsonl by format
    shards: Path  # of those that can be trained on
    model: str
    num_blocks: list[int]  # of each sample of the shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    folder = tmp_path_factory.mktemp("published")
    rows = {}
    for name, (published, _) in examples().items():
        source = write_published(folder / name, name, published)
        rows[name] = import_file(folder / name, "auto", source).folder / "rows.jsonl"
    trained = [path for name, path in rows.items() if name not in FOR_CHOICE_ALONE]
    build(trained, folder / "shards", maxcount=5, maxsize=10**9)
    (folder / "all.jsonl").write_text("".join(path.read_text() for path in trained))
    write_tiny(folder / "all.jsonl", folder / "tiny", seed=0)
    lines = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    return Sets(rows, folder / "shards", str(folder / "tiny"), [len(row.get("image_output", [])) for row in lines])


def encoded(sets: Sets, stage: Stage) -> list[EncodedSample]:
    encoder = load_encoder(sets.model, stage=stage, latent_size=K)
    folder = load_manifest(sets.shards)
    read = SampleReader(folder)
    return [encoder(read(number)) for number in range(folder.num_samples)]


def test_the_page_has_every_format() -> None:
    assert examples().keys() == FORMATS.keys()


def test_each_example_becomes_what_the_page_shows(sets: Sets) -> None:
    """With `auto`, which takes each for what it is."""
    for name, (_, ours) in examples().items():
        (row,) = [json.loads(line) for line in sets.rows[name].read_text().splitlines()]
        assert without_digests(row) == ours
        assert json.loads((sets.rows[name].parent / "report.json").read_text())["format"] == name


@pytest.mark.parametrize("stage", STAGES)
def test_they_are_built_and_encoded(sets: Sets, stage: Stage) -> None:
    samples = encoded(sets, stage)
    assert len(samples) == len(sets.num_blocks) == len(FORMATS) - len(FOR_CHOICE_ALONE)
    latents = [0 if stage == "text" else K * blocks for blocks in sets.num_blocks]
    assert [int(sample.latent_mask.sum()) for sample in samples] == latents
    assert all((sample.labels != -100).any() for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_each_stage(sets: Sets, stage: Stage) -> None:
    samples = encoded(sets, stage)
    expected, gradients = plain_loop.summed(sets.model, [vars(sample) for sample in samples], stage)
    backbone = load_backbone(sets.model, dtype=torch.float32)
    model = MirageModel(backbone, stage=stage, ce_loss_weight=0.1 if stage == "stage1" else 1.0)
    loss = model(collate(samples, align_latents=stage == "stage2")).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    weights = dict(backbone.hf.named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(weights[name].grad, gradient, rtol=1e-3, atol=1e-5)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        assert model(collate(samples, align_latents=stage == "stage2")).loss < loss


@pytest.mark.slow
def test_questions_are_decoded_and_scored(sets: Sets) -> None:
    decoder, encoder = load_decoder(sets.model, latent_size=K, max_new_tokens=8, dtype=torch.float32)
    choice = load_task("choice")
    for name in ("comt", "sat", *FOR_CHOICE_ALONE):
        ((_, sample),) = read_questions(sets.rows[name])
        (answer,) = decoder.generate(collate([encoder.prompt(sample)], align_latents=True))
        assert len(answer.ids) > 0
        assert choice.score(sample, encoder.text_of(answer.ids))["choice"].status in ("Right", "Wrong", "Invalid")
