"""Control arms in training: latent targets against those of images made by plain Pillow, and who reads which images."""

import io
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from PIL import Image, ImageOps

from data_tools.build import build
from launch.planner.level import folder_costs
from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data import stream
from mirage_ds.data.collate import collate
from mirage_ds.data.costs import TOKEN_PATCHES
from mirage_ds.data.counts import count_texts, save_counts
from mirage_ds.data.encode import EncodedSample, Encoder, load_encoder
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.rows import Sample
from mirage_ds.data.shard_samples import read_range
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.data.target_cache import TargetCache
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.targets import latent_targets
from mirage_ds.recipe import load_config
from mirage_ds.sizing.measured import workload
from mirage_ds.training import after_step
from mirage_ds.training.cached_targets import TargetWriter
from mirage_ds.training.dry_run import take
from mirage_ds.training.run_data import deal_steps, open_stream
from mirage_ds.training.sample_costs import measure_samples
from mirage_ds.zero3 import distributed

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
NUM_ROWS, K, SEED = 8, 3, 5
WITH_HELPERS = [0, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and shards. Row 1 has no helper image, row 2 two and two input images; the helper image of row 3 is a
    photo that stands on its side, and its input image is smaller; row 4 has a K of its own."""
    folder = tmp_path_factory.mktemp("ground")
    write_rows(folder / "rows", NUM_ROWS)
    rows = [make_row(number) for number in range(NUM_ROWS)]
    rows[1] |= {"image_output": None, "text_output": "No image"}
    rows[2] |= {"text_output": "<output_image>a<output_image>b", "text_input": "Which <image> or <image>?"}
    for kind, first in (("input", "2_0"), ("output", "2_1")):
        rows[2][f"image_{kind}"] = [f"images/{first}.png", f"images/sign_{kind}.png"]
        sign = image_bytes((112, 112), seed=41 + len(kind))
        (folder / "rows" / "images" / f"sign_{kind}.png").write_bytes(sign)
    rows[3] |= {"image_output": "images/photo.jpg"}
    rows[4] |= {"latent_size": 7}
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.open(io.BytesIO(image_bytes((140, 84), seed=40)))
    photo.save(folder / "rows" / "images" / "photo.jpg", exif=exif)
    path = write_jsonl(folder / "rows" / "rows.jsonl", rows)
    write_tiny(path, folder / "model", seed=0)
    build(path, folder / "shards", maxcount=4, maxsize=10**9)
    return folder


@pytest.fixture(scope="module")
def shards(ground: Path) -> ShardFolder:
    return load_manifest(ground / "shards")


@pytest.fixture(scope="module")
def encoder(ground: Path) -> Encoder:
    return load_encoder(str(ground / "model"), stage="stage1", latent_size=K)


@pytest.fixture(scope="module")
def model(ground: Path) -> MirageModel:
    return make_model(ground)


@pytest.fixture(scope="module")
def own(shards: ShardFolder) -> list[Sample]:
    """The rows as they are."""
    return [SampleReader(shards)(number) for number in range(NUM_ROWS)]


def make_model(ground: Path) -> MirageModel:
    return MirageModel(load_backbone(str(ground / "model"), dtype=torch.float32), stage="stage1", ce_loss_weight=0.1)


def targets(model: MirageModel, *samples: EncodedSample) -> torch.Tensor:
    """[latents, D]: of the encoded helper images."""
    batch = collate(list(samples), align_latents=False)
    _, embeds = model.tower.encode(batch)
    return latent_targets(embeds, batch, "average", torch.float32).targets


def as_bmp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "BMP")
    return file.getvalue()


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def donor_of(sample: Sample, own: list[Sample]) -> int:
    """The row whose first helper image is the sample's: their bytes all differ."""
    (number,) = [number for number, each in enumerate(own) if each.helper_images[:1] == sample.helper_images[:1]]
    return number


def images_by_pillow(images: str, sample: Sample, own: list[Sample], number: int) -> list[Image.Image]:
    """What must stand in the places of a row's helper images."""
    helpers = [upright(data) for data in own[number].helper_images]
    if images == "gray":
        return [Image.new("RGB", image.size, (128, 128, 128)) for image in helpers]
    if images == "input":
        return [upright(data) for data in own[number].input_images]
    donor = donor_of(sample, own)
    assert donor != number
    others = [upright(data) for data in own[donor].helper_images]
    return [*others, others[-1]][: len(helpers)]


@pytest.mark.parametrize("images", ["gray", "input", "shuffled"])
def test_targets_are_those_of_the_images_that_the_arm_names(
    shards: ShardFolder, encoder: Encoder, model: MirageModel, own: list[Sample], images: Any
) -> None:
    """Bit for bit those of the same row with images that Pillow made as its helper images; and not its own."""
    read = SampleReader(shards, helpers=Helpers(images, SEED))
    for number in WITH_HELPERS:
        sample = read(number)
        files = tuple(as_bmp(image) for image in images_by_pillow(images, sample, own, number))
        expected = targets(model, encoder(replace(own[number], helper_images=files)))
        found = targets(model, encoder(sample))
        assert torch.equal(found, expected)
        assert len(found) == {2: 2 * K, 4: 7}.get(number, K)
        assert not torch.allclose(found, targets(model, encoder(own[number])), atol=1e-3)


def test_a_gray_image_is_as_the_encoder_turns_the_photo(ground: Path, shards: ShardFolder, own: list[Sample]) -> None:
    """Row 3, stored with 140 x 84 pixels."""
    for turned, size in ((True, (84, 140)), (False, (140, 84))):
        read = SampleReader(shards, helpers=Helpers("gray", exif_orientation=turned))
        gray = Image.open(io.BytesIO(read(3).helper_images[0]))
        assert gray.size == size
        assert gray.convert("RGB").getcolors() == [(140 * 84, (128, 128, 128))]
        encoder = load_encoder(str(ground / "model"), stage="stage1", latent_size=K, exif_orientation=turned)
        grids = [encoder(sample).image_grid_thw_latent.tolist() for sample in (read(3), own[3])]
        assert grids[0] == grids[1]


def test_none_has_no_latent_loss_and_the_text_loss_of_the_stage_text(
    ground: Path, shards: ShardFolder, encoder: Encoder, model: MirageModel, own: list[Sample]
) -> None:
    read = SampleReader(shards, helpers=Helpers("none"))
    batch = collate([encoder(read(number)) for number in range(NUM_ROWS)], align_latents=False)
    assert (len(batch.latent_rows), batch.num_grounded_samples, batch.helper_grids) == (0, 0, [])
    text_encoder = load_encoder(str(ground / "model"), stage="text", latent_size=K)
    expected = collate([text_encoder(sample) for sample in own], align_latents=False)
    text_model = MirageModel(load_backbone(str(ground / "model"), dtype=torch.float32), stage="text", ce_loss_weight=1)
    losses = model(batch)
    assert losses.latent_loss.item() == 0
    assert losses.ce_loss.item() == text_model(expected).loss.item()
    losses.loss.backward()


def test_kept_targets_are_those_of_the_images_that_were_encoded(
    ground: Path, shards: ShardFolder, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another row lie in the slots of the row that got them, with its K. Then the other row is not read."""
    helpers, model = Helpers("shuffled", SEED), make_model(ground)
    values = model.embed_tokens.weight.shape[1] + 1
    facts = encoder.helper_facts() | helpers.facts()
    cache = TargetCache.open(tmp_path, shards, facts, latent_size=K, values=values, limit_bytes=2**30)
    model.keep_targets = TargetWriter(cache)
    read, reads = SampleReader(shards, cache, helpers), []
    monkeypatch.setattr(
        stream, "read_range", lambda *where, again: (reads.append(where), read_range(*where, again=again))[1]
    )
    for number in WITH_HELPERS:
        encoded = encoder(read(number))
        expected = targets(model, encoded)
        model(collate([encoded], align_latents=False))
        assert len(reads) == 2
        kept = encoder(read(number))
        assert kept.cached_targets is not None
        assert torch.equal(kept.cached_targets[:, :-1], expected)
        assert len(reads) == 3
        reads.clear()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank."""
    for name, value in {"rank": 0, "world_size": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)


def configuration(ground: Path, *overrides: str) -> Config:
    paths = [f"data.shards={ground / 'shards'}", f"model.path={ground / 'model'}", f"model.latent_size={K}"]
    counts = ["train.micro_batch_size_per_gpu=1", "train.gradient_accumulation_steps=1", "data.num_workers=0"]
    return load_config(RECIPE, [*paths, *counts, f"run.seed={SEED}", *overrides])


@pytest.mark.parametrize("images", ["gray", "input", "shuffled", "none"])
def test_all_that_read_training_samples_have_the_arm(
    ground: Path, encoder: Encoder, alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Any
) -> None:
    """The dry run, the stream from its start and from a later position, and the validation, on a folder of its own."""
    build(ground / "rows" / "rows.jsonl", tmp_path / "other", maxcount=3, maxsize=10**9)
    other = load_manifest(tmp_path / "other")
    config = configuration(ground, f"data.helper={images}", f"evaluation.shards={other.path}")
    folder = load_manifest(ground / "shards")
    costs, _ = measure_samples(config, encoder, folder)
    start: Any = SimpleNamespace(
        shards=ShardFolders((folder,), (1.0,)), encoder=encoder, costs=costs, device=torch.device("cpu")
    )
    read = SampleReader(folder, helpers=Helpers(images, SEED))
    expected = {sample.key: sample for sample in map(encoder, map(read, range(NUM_ROWS)))}
    streams = [open_stream(config, start, deal_steps(config, start, position), None) for position in (0, 5)]
    batches = [list(islice(each, NUM_ROWS - position)) for each, position in zip(streams, (0, 5), strict=True)]
    assert [batch.keys for batch in batches[0][5:]] == [batch.keys for batch in batches[1]]
    for batch in [*batches[0], *batches[1], take(config, start, [3], 1)]:
        check(batch, expected[batch.keys[0]])

    def validation(*arguments: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(losses=lambda: validated.extend(arguments[3]([number]) for number in arguments[4]))

    validated: list[Batch] = []
    monkeypatch.setattr(after_step, "Validation", validation)
    quiet = SimpleNamespace(flush=lambda: None)
    trainer: Any = SimpleNamespace(engine=None, num_passes=None, agree_on_fault=None, device=None, metrics=quiet)
    trainer.max_steps = 1
    state: Any = SimpleNamespace(ends_early=False, step=1)
    after_step.validate_if_due(trainer, config, encoder)(state)
    read = SampleReader(other, helpers=Helpers(images, SEED))
    assert len(validated) == NUM_ROWS
    for number, batch in enumerate(validated):
        check(batch, encoder(read(number)))


def check(batch: Batch, sample: EncodedSample) -> None:
    """A micro-batch of this one sample."""
    assert batch.keys == [sample.key]
    assert torch.equal(batch.input_ids[0], sample.input_ids)
    patches = torch.cat([sample.pixel_values, sample.pixel_values_latent])
    assert torch.equal(batch.pixel_values[: len(patches)], patches)
    assert batch.latent_sizes == (sample.latent_sizes if len(sample.pixel_values_latent) else [])


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_counted_lengths_are_those_of_the_encoded_samples(
    ground: Path, shards: ShardFolder, tmp_path: Path, stage: Any
) -> None:
    """Of `none` without latents, of the others with them. Packed rows rely on it."""
    folder = load_manifest(shutil.copytree(shards.path, tmp_path / "shards"))
    encoder = load_encoder(str(ground / "model"), stage=stage, latent_size=K)
    save_counts(folder, encoder.tokenizer, count_texts(folder, encoder.tokenizer, system_turn=True), system_turn=True)
    for images in ("true", "gray", "input", "shuffled", "none"):
        config = configuration(ground, f"data.helper={images}", f"train.stage={stage}")
        read = SampleReader(folder, helpers=Helpers.of(config))
        lengths = [len(encoder(read(number)).input_ids) for number in range(NUM_ROWS)]
        assert measure_samples(config, encoder, folder)[0].all().tokens.tolist() == lengths


@pytest.mark.parametrize("stage", ["text", "stage2"])
def test_stages_that_read_no_helper_image_read_no_other_row(ground: Path, shards: ShardFolder, stage: str) -> None:
    """Nor are they refused for what they do not read."""
    for images in ("gray", "input", "shuffled"):
        assert Helpers.of(configuration(ground, f"data.helper={images}", f"train.stage={stage}")).images is True
    assert Helpers.of(configuration(ground, "data.helper=none", f"train.stage={stage}")).images == "none"


@pytest.mark.parametrize("images", ["true", "gray", "input", "shuffled", "none"])
def test_memory_and_time_are_estimated_for_the_arm(
    ground: Path, shards: ShardFolder, encoder: Encoder, images: str
) -> None:
    """Patches are those that are encoded; without shards the assumed row loses its helper image and block by `none`."""
    config = configuration(ground, f"data.helper={images}")
    read = SampleReader(shards, helpers=Helpers.of(config))
    encoded = [encoder(read(number)) for number in range(NUM_ROWS)]
    patches = [len(sample.pixel_values) + len(sample.pixel_values_latent) for sample in encoded]
    planned_patches = np.zeros(NUM_ROWS, np.int64)
    for shape in workload(config).shapes:
        planned_patches[shape.numbers] = shape.patches
    assert planned_patches.tolist() == patches
    planned = folder_costs(config)
    assert planned is not None
    costs = planned.costs.all()
    assert (costs.costs - TOKEN_PATCHES * costs.tokens).tolist() == patches
    nowhere = f"data.shards={ground / 'nowhere'}"
    arms = ("data.helper=true", f"data.helper={images}")
    own, found = (workload(configuration(ground, nowhere, arm)).largest for arm in arms)
    is_none = images == "none"
    assert own.patches == found.patches * (2 if is_none else 1)
    assert own.tokens == found.tokens + (K + 2 if is_none else 0)
    latents = workload(configuration(ground, f"data.helper={images}", "train.stage=stage2")).largest.latents
    assert latents == (0 if is_none else 2 + 6), "the blocks of row 2, and 6 more columns of the one of row 4"
