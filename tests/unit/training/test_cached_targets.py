"""Training from kept latent targets: the bits of the targets, the losses of the plain loop, and what is not done."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL
import plain_loop
import pytest
import torch
from dealt import in_order
from generated_rows import make_row, write_jsonl, write_rows

from data_tools.build import build
from mirage_ds.batch import Batch
from mirage_ds.data import encode
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, make_loader
from mirage_ds.data.target_cache import TargetCache
from mirage_ds.errors import DataError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model import mirage
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.targets import LatentTargets, add_cached
from mirage_ds.recipe import load_config
from mirage_ds.training.cached_targets import TargetWriter, open_target_cache
from mirage_ds.zero3 import distributed

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
SAMPLES, LATENT_SIZE = 10, 3


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and shards of 10 samples, each with one input and one helper image."""
    folder = tmp_path_factory.mktemp("ground")
    rows = write_rows(folder / "rows", SAMPLES)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return folder


@pytest.fixture
def shards(ground: Path) -> ShardFolder:
    return load_manifest(ground / "shards")


@pytest.fixture
def encoder(ground: Path) -> Encoder:
    return load_encoder(str(ground / "model"), stage="stage1", latent_size=LATENT_SIZE)


@pytest.fixture
def cache(ground: Path, shards: ShardFolder, encoder: Encoder, tmp_path: Path) -> TargetCache:
    return open_cache(ground, shards, encoder, tmp_path)


def open_cache(ground: Path, shards: ShardFolder, encoder: Encoder, folder: Path) -> TargetCache:
    hidden_size = load_backbone(str(ground / "model"), dtype=torch.float32).embed_tokens.weight.shape[1]
    sizes = {"latent_size": LATENT_SIZE, "values": hidden_size + 1, "limit_bytes": 2**30}
    return TargetCache.open(folder, shards, encoder.helper_facts(), **sizes)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that the encoder decodes, by name."""
    names: list[str] = []
    original = encode.decode

    def decode(data: bytes, where: str, **options: Any) -> object:
        names.append(where)
        return original(data, where, **options)

    monkeypatch.setattr(encode, "decode", decode)
    return names


def make_model(ground: Path, cache: TargetCache | None = None, dtype: torch.dtype = torch.float32) -> MirageModel:
    model = MirageModel(load_backbone(str(ground / "model"), dtype=dtype), stage="stage1", ce_loss_weight=0.1)
    model.keep_targets = None if cache is None else TargetWriter(cache)
    return model


def batches(shards: ShardFolder, encoder: Encoder, size: int, cache: TargetCache | None = None) -> Iterator[Batch]:
    """Read in this process, each when it is due, so that a batch sees what those before it have kept."""
    align = partial(collate, align_latents=False)
    return iter(
        make_loader(SampleReader(shards, cache), encoder, align, in_order(Share(0, 1, size), shards), num_workers=0)
    )


class Outcome:
    """Losses, gradients and latents of one micro-batch."""

    def __init__(self, model: MirageModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        latents: list[LatentTargets] = []

        def watched(pooled: LatentTargets, batch: Batch) -> LatentTargets:
            latents.append(add_cached(pooled, batch))
            return latents[0]

        monkeypatch.setattr(mirage, "add_cached", watched)
        model.zero_grad()
        self.losses = model(batch)
        self.losses.loss.backward()
        (self.latents,) = latents
        self.grad_norm = grad_norm(model)


def grad_norm(model: MirageModel) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([parameter.grad.norm() for parameter in trained]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_epoch_encodes_no_helper_image(
    ground: Path,
    shards: ShardFolder,
    encoder: Encoder,
    cache: TargetCache,
    decoded: list[str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Targets, their norms and the inputs have the bits of a model that encodes all; so have the losses here."""
    plain, caching = make_model(ground, dtype=dtype), make_model(ground, cache, dtype)
    expected, ours = batches(shards, encoder, 1), batches(shards, encoder, 1, cache)
    for number in range(2 * SAMPLES):
        decoded.clear()
        batch = next(ours)
        in_first_epoch = number < SAMPLES
        assert [".helper" in name for name in decoded] == ([False, True] if in_first_epoch else [False])
        assert len(batch.helper_grids) == in_first_epoch
        rows, columns = batch.image_grids[0]
        assert in_first_epoch or len(batch.pixel_values) == 4 * rows * columns
        whole = next(expected)
        assert (batch.keys, batch.num_grounded_samples) == (whole.keys, whole.num_grounded_samples)
        outcome, reference = (Outcome(*each, monkeypatch) for each in ((caching, batch), (plain, whole)))
        for own, theirs in zip(outcome.latents, reference.latents, strict=True):
            assert own.dtype == theirs.dtype
            assert torch.equal(own, theirs)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert outcome.losses.loss.item() == pytest.approx(reference.losses.loss.item(), rel=tolerance)
        assert outcome.losses.latent_loss.item() == pytest.approx(reference.losses.latent_loss.item(), rel=tolerance)
        assert outcome.grad_norm == pytest.approx(reference.grad_norm, rel=10 * tolerance)


@pytest.mark.parametrize("cached_slots", [range(0, SAMPLES, 2), range(3), range(SAMPLES)], ids=str)
def test_mixed_micro_batches_have_the_losses_of_the_plain_loop(
    ground: Path, shards: ShardFolder, encoder: Encoder, cache: TargetCache, cached_slots: range
) -> None:
    """Some samples of a micro-batch have kept targets, at its begin, its end or in between."""
    model = make_model(ground, cache)
    for batch in islice(batches(shards, encoder, 1, cache), SAMPLES):
        if batch.target_slots[0] in cached_slots:
            model(batch)
    model.keep_targets = None
    read, read_cached = SampleReader(shards), SampleReader(shards, cache)
    for numbers in (range(start, start + 3) for start in range(0, SAMPLES - 2, 3)):
        batch = collate([encoder(read_cached(number)) for number in numbers], align_latents=False)
        assert batch.target_slots == [number for number in numbers if number not in cached_slots]
        assert len(batch.helper_grids) == len(batch.target_slots)
        assert batch.num_grounded_samples == 3
        model.zero_grad()
        losses = model(batch)
        (losses.loss / 3).backward()
        samples = [vars(encoder(read(number))) for number in numbers]
        expected = plain_loop.train(str(ground / "model"), [samples], "stage1", lrs=[0.0], ce_loss_weight=0.1)
        assert losses.loss.item() / 3 == pytest.approx(expected["losses"][0], rel=1e-5)
        assert grad_norm(model) == pytest.approx(expected["grad_norms"][0], rel=1e-4)


def test_blocks_of_several_sizes(
    ground: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K by the configuration, by the row, and for each of two blocks: kept targets have the bits of encoded ones, and a
    micro-batch of both has the losses of the plain loop."""
    rows = [make_row(number) for number in range(4)]
    rows[1] |= {"latent_size": [2, 8], "text_output": "<output_image>a<output_image>b"}
    rows[1] |= {"image_output": ["images/1_1.png", "images/2_1.png"]}
    rows[2] |= {"image_output": None, "text_output": "No image"}
    rows[3] |= {"latent_size": 5}
    build(write_jsonl(ground / "rows" / "blocks.jsonl", rows), tmp_path / "shards", maxcount=4, maxsize=10**9)
    shards = load_manifest(tmp_path / "shards")
    cache = open_cache(ground, shards, encoder, tmp_path / "targets")
    plain, caching = make_model(ground), make_model(ground, cache)
    read, read_cached = SampleReader(shards), SampleReader(shards, cache)
    for number in (1, 3):
        caching(collate([encoder(read_cached(number))], align_latents=False))
    for number, latents in ((1, 10), (3, 5)):
        kept = collate([encoder(read_cached(number))], align_latents=False)
        assert (len(kept.cached_targets), kept.helper_grids, kept.target_slots) == (latents, [], [])
        found = Outcome(caching, kept, monkeypatch).latents
        encoded = Outcome(plain, collate([encoder(read(number))], align_latents=False), monkeypatch).latents
        assert all(torch.equal(*each) for each in zip(found, encoded, strict=True))
    batch = collate([encoder(read_cached(number)) for number in range(4)], align_latents=False)
    assert (batch.latent_sizes, len(batch.cached_targets), batch.num_grounded_samples) == ([LATENT_SIZE], 15, 3)
    mixed = Outcome(plain, batch, monkeypatch)
    samples = [vars(encoder(read(number))) for number in range(4)]
    expected = plain_loop.train(str(ground / "model"), [samples], "stage1", lrs=[0.0], ce_loss_weight=0.1)
    assert mixed.losses.loss.item() / 4 == pytest.approx(expected["losses"][0], rel=1e-5)
    assert mixed.grad_norm / 4 == pytest.approx(expected["grad_norms"][0], rel=1e-4)


def test_whatever_decides_the_targets_has_a_file_of_its_own(
    ground: Path, shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    settings = [f"model.cache_targets={tmp_path}"]
    model = make_model(ground)
    visual = model.tower.visual

    def name(*overrides: str, **images: Any) -> str:
        config = load_config(RECIPE, [*settings, *overrides])
        encoder = load_encoder(str(ground / "model"), stage="stage1", latent_size=LATENT_SIZE, **images)
        start = SimpleNamespace(encoder=encoder, shards=ShardFolders((shards,), (1.0,)), device=torch.device("cpu"))
        return open_target_cache(SimpleNamespace(module=model), config, start).caches[0].path.name

    names = [name(), name(max_pixels=56 * 56), name(exif_orientation=False), name(compress_strategy="grid")]
    names += [name(f"data.helper={arm}") for arm in ("gray", "input", "shuffled")]
    names.append(name("data.helper=shuffled", "run.seed=7"))
    assert name("data.helper=gray", "run.seed=7") == names[4]
    assert name() == name("run.seed=7") == names[0]
    visual.config.window_size *= 2
    names.append(name())
    visual.patch_embed.proj.weight.data.view(-1)[-1] += 1
    names.append(name())
    monkeypatch.setattr(PIL, "__version__", "0.1")
    names.append(name())
    assert len(set(names)) == len(names) == 11


class Copied:
    """A GPU's event after a copy to the host."""

    is_over = False

    def query(self) -> bool:
        return self.is_over


def test_a_copy_that_is_under_way_is_written_later(cache: TargetCache) -> None:
    """The step does not wait for it. Copies of one stream end in their order."""
    writer, copied = TargetWriter(cache), Copied()
    values = torch.ones(LATENT_SIZE, (int(cache.offsets[1]) // 4 - 1) // LATENT_SIZE)
    writer.copies.append(([0], [LATENT_SIZE], values, copied))
    for slot in (1, 2):
        writer([slot], [LATENT_SIZE], LatentTargets(values[:, :-1], values[:, :-1] * slot, values[:, -1]))
        assert [cache.read(range(each, each + 1)) is not None for each in range(3)] == [slot == 2] * 3
        copied.is_over = True


def test_workers_do_not_need_images_that_are_kept(
    ground: Path, shards: ShardFolder, encoder: Encoder, cache: TargetCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real data workers: forked after the first epoch, from a process that cannot decode helper images."""
    model = make_model(ground, cache)
    for batch in islice(batches(shards, encoder, 2, cache), SAMPLES // 2):
        model(batch)
    original = encode.decode

    def decode(data: bytes, where: str, **options: Any) -> object:
        if ".helper" in where:
            raise DataError(f"decoded {where}")
        return original(data, where, **options)

    monkeypatch.setattr(encode, "decode", decode)
    align = partial(collate, align_latents=False)
    for targets in (cache, None):
        loader = make_loader(
            SampleReader(shards, targets), encoder, align, in_order(Share(0, 1, 2), shards), num_workers=1
        )
        if targets is None:
            with pytest.raises(DataError, match="decoded"):
                next(iter(loader))
        else:
            assert [len(batch.cached_targets) for batch in islice(loader, 5)] == [2 * LATENT_SIZE] * 5
