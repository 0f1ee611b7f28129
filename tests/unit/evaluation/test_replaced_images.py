"""`--image`: what is asked instead; and the targets of `oracle` against those of training."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from generated_rows import image_bytes, write_rows
from PIL import Image

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import Arm, parse_arms
from mirage_ds.evaluation.latents.replacements import Replacements
from mirage_ds.evaluation.latents.states import States
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference.generate import load_decoder
from mirage_ds.model.mirage import MirageModel

SEED = 3
ARMS = {arm.image: arm for arm in parse_arms("own", "all")}


def sample(number: int, images: int) -> Sample:
    """A question with so many images, of several sizes; their slots are in front, or in the text."""
    data = tuple(image_bytes((56 + 28 * number, 56 + 28 * place), seed=10 * number + place) for place in range(images))
    text = "where? <image> and <image>?" if images == 2 else "where?"
    return Sample(f"{number:09d}", text, "", data)


SAMPLES = [sample(0, 1), sample(1, 2), sample(2, 0), sample(3, 3), sample(4, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(write_rows(folder / "rows"), folder / "model", seed=0)
    return folder / "model"


@pytest.fixture(scope="module")
def replacements(model: Path) -> Replacements:
    decoder, encoder = load_decoder(str(model), latent_size=4, dtype=torch.float32)
    rows = [Row(number, f"rows:{number}", each) for number, each in enumerate(SAMPLES)]
    return Replacements(decoder, encoder, rows, SEED)


def asked(replacements: Replacements, arm: Arm) -> list[EncodedSample]:
    return [replacements.prompt(arm, row) for row in replacements.rows]


def same(one: EncodedSample, other: EncodedSample) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "position_ids", "pixel_values")
    )


def test_own_and_rows_without_images(replacements: Replacements) -> None:
    for arm in ARMS.values():
        assert same(replacements.prompt(arm, replacements.rows[2]), replacements.encoder.prompt(SAMPLES[2]))
    assert all(map(same, asked(replacements, ARMS["own"]), map(replacements.encoder.prompt, SAMPLES)))


def test_gray(replacements: Replacements) -> None:
    """One color, and the same tokens as with the row's own images: they have the same size."""
    for number, found in enumerate(asked(replacements, ARMS["gray"])):
        sizes = [Image.open(io.BytesIO(data)).size for data in SAMPLES[number].input_images]
        gray = [png(np.full((height, width, 3), 128, np.uint8)) for width, height in sizes]
        expected = replacements.encoder.prompt(replace(SAMPLES[number], input_images=tuple(gray)))
        assert same(found, expected)
        assert torch.equal(found.input_ids, replacements.encoder.prompt(SAMPLES[number]).input_ids)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_gray_image_is_turned_as_its_photo(replacements: Replacements) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (112, 56), "red").save(file, "JPEG", exif=exif)
    row = Row(0, "", Sample("000000000", "where?", "", (file.getvalue(),)))
    found = replacements.prompt(ARMS["gray"], row)
    assert found.image_grid_thw.tolist() == [[1, 8, 4]]
    assert torch.equal(found.image_grid_thw, replacements.encoder.prompt(row.sample).image_grid_thw)


def test_other(replacements: Replacements) -> None:
    """Slot i has image i of one other row, or its last; no row has its own, and rows with images alone take part."""
    donors = []
    for number, found in enumerate(asked(replacements, ARMS["other"])):
        slots = len(SAMPLES[number].input_images)
        fitting = [
            other
            for other, donor in enumerate(SAMPLES)
            if (images := donor.input_images) or not slots
            if same(found, replacements.encoder.prompt(replace(SAMPLES[number], input_images=filled(images, slots))))
        ]
        donors += fitting if slots else []
    assert sorted(donors) == [0, 1, 3, 4], "one donor for each row, and each row once"
    with_images = [number for number in range(5) if SAMPLES[number].input_images]
    assert all(row != donor for row, donor in zip(with_images, donors, strict=True))


def filled(images: tuple[bytes, ...], slots: int) -> tuple[bytes, ...]:
    return (images + images[-1:] * slots)[:slots]


def test_none(replacements: Replacements) -> None:
    """The prompt of the same text, without any slot."""
    texts = ["where?", "where?  and ?", "where?", "where?", "where?"]
    for text, found in zip(texts, asked(replacements, ARMS["none"]), strict=True):
        assert same(found, replacements.encoder.prompt(Sample(found.key, text, "")))
        assert not found.image_mask.any()
    slots = Row(0, "", Sample("000000000", "<image> to <output_image>", "", SAMPLES[1].input_images))
    assert not replacements.prompt(ARMS["none"], slots).image_mask.any()


def test_an_arm_that_nothing_is_written_for_is_not_taken_for_another(replacements: Replacements) -> None:
    with pytest.raises(AssertionError, match="in the arm image:black"):
        replacements.prompt(Arm("image:black", image="black"), replacements.rows[0])
    with pytest.raises(AssertionError, match="in the arm later"):
        replacements.decoder_of(Arm("later", latents="later"), States({}, 1))


@pytest.mark.parametrize("strategy", ["average", "average_all", "grid"])
def test_the_oracle_s_targets_are_those_of_training(strategy: str, model: Path, tmp_path: Path) -> None:
    """With the way to pool that the export names; K is the row's own, or the model's.

    Not bit for bit: here the tower has one image at a time, in training all of the micro-batch, and some processors sum
    a matrix product of other rows in another order.
    """
    path = shutil.copytree(model, tmp_path / "model") / "config.json"
    settings = {"latent_size": 4, "stage": "stage1", "system_turn": True, "compress_strategy": strategy}
    ids = load_encoder(str(model), stage="stage1", latent_size=4).ids
    settings["latent_token_ids"] = {"pad": ids.latent_pad, "start": ids.latent_start, "end": ids.latent_end}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mirage": settings}))
    decoder, encoder = load_decoder(str(path.parent), dtype=torch.float32)
    samples = [each for _, each in read_questions(write_rows(tmp_path / "rows", 3), helpers=True)]
    samples[1] = replace(samples[1], latent_sizes=(2,))
    rows = [Row(number, "", each) for number, each in enumerate(samples)]
    replacements = Replacements(decoder, encoder, rows, SEED)
    training = MirageModel(decoder.backbone, stage="stage1", ce_loss_weight=1.0, compress_strategy=strategy)
    training.keep_targets = lambda slots, sizes, pooled: kept.append(pooled.inputs)
    for each, size in zip(samples, (4, 2, 4), strict=True):
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            training(collate([replace(encoder(each), target_slots=range(1))], align_latents=False))
        (found,) = replacements.targets(each.key)
        assert found.shape == (size, decoder.backbone.embed_tokens.embedding_dim)
        torch.testing.assert_close(found, kept[0], rtol=1e-5, atol=1e-6)


def test_no_helper_image_no_targets(replacements: Replacements) -> None:
    assert replacements.targets("000000000") == []


def test_an_answer_of_any_length_has_targets(model: Path, tmp_path: Path) -> None:
    """In training the encoder has a `max_length`, which is no limit of what is asked and compared."""
    decoder, _ = load_decoder(str(model), latent_size=4, dtype=torch.float32)
    (sample,) = (each for _, each in read_questions(write_rows(tmp_path / "rows", 1), helpers=True))
    long = replace(sample, text_output="left " * 60 + sample.text_output)
    encoder = load_encoder(str(model), stage="stage1", latent_size=4, max_length=40)
    with pytest.raises(DataError, match="allows 40"):
        encoder(long)
    found, expected = (
        Replacements(decoder, encoder, [Row(0, "", each)], SEED).targets(sample.key) for each in (long, sample)
    )
    assert len(found) == 1
    assert torch.equal(found[0], expected[0])
