"""Decoding with hidden images: a pixel that changes after a row's first block changes no later logit.

From then on the row finds, at the columns of its images, the keys and values of all layers that it has with one other
pixel in each image; at all other columns its own.
"""

from dataclasses import replace
from pathlib import Path

import flash_attn_stub
import pytest
import torch
from flash_attn_stub import FLASH, VARLEN
from generated_rows import other_pixel
from scripted import Watched
from talkative import write_questions, write_talkative
from transformers import DynamicCache

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import read_questions
from mirage_ds.inference.generate import Decoder, load_decoder

WITH_IMAGES = 2
"""The question that has two of them, and text."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talkative(tmp_path_factory.mktemp("talkative"))


@pytest.fixture
def loaded(model: Path, tmp_path: Path) -> tuple[Decoder, Encoder]:
    return load_decoder(str(model), latent_size=2, dtype=torch.float32)


def script(decoder: Decoder) -> list[int]:
    """Text and two blocks, as they are emitted; what is chosen inside a block does not count."""
    block = [decoder.ids.latent_start, *[decoder.ids.latent_pad] * decoder.latent_size, decoder.ids.latent_end]
    return [20, *block, 21, 22, *block, 23, 24]


def log_probs(loaded: tuple[Decoder, Encoder], questions: Path, changed_at: int | None) -> torch.Tensor:
    """[tokens, V], of every emitted token; before the input of number `changed_at`, a pixel of each image changes."""
    decoder, encoder = loaded
    tokens = script(decoder)
    decoder.sampling = watched = Watched(script=iter(tokens))
    decoder.max_new_tokens = len(tokens)
    sample = [sample for _, sample in read_questions(questions)][WITH_IMAGES]
    changed = replace(sample, input_images=tuple(map(other_pixel, sample.input_images)))
    batch, other = (collate([encoder.prompt(each)], align_latents=True) for each in (sample, changed))
    images, inputs, step = batch.image_mask[0].nonzero().flatten(), [], decoder.backbone.step
    others = DynamicCache()
    with torch.inference_mode():
        step(decoder.prompt_embeds(other), other.position_ids, other.attention_mask, others)

    def changing_step(embeds, position_ids, mask, cache):
        if len(inputs) - 1 == changed_at:
            for layer, from_other in zip(cache.layers, others.layers, strict=True):
                layer.keys[:, :, images] = from_other.keys[:, :, images]
                layer.values[:, :, images] = from_other.values[:, :, images]
        inputs.append(embeds)
        return step(embeds, position_ids, mask, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.backbone, "step", changing_step)
        (answer,) = decoder.generate(batch)
    assert answer.ids == tokens
    return torch.cat(watched.log_probs)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("latent_size", [2, 0], ids=["two latents", "markers alone"])
def test_a_pixel_that_changes_after_the_block_changes_no_later_logit(
    loaded: tuple[Decoder, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latent_size: int, attention: str
) -> None:
    questions, (decoder, _) = write_questions(tmp_path / "rows", WITH_IMAGES + 1), loaded
    decoder.latent_size = latent_size
    if attention == FLASH:
        flash = flash_attn_stub.install(monkeypatch)
        decoder.backbone.attention = decoder.backbone.hf.config._attn_implementation = FLASH
    end = script(decoder).index(decoder.ids.latent_end)
    for sees, at, changes in ((False, end, False), (False, end - 1, True), (True, end, True)):
        decoder.answer_sees_image = sees
        before, after = log_probs(loaded, questions, None), log_probs(loaded, questions, at)
        assert torch.equal(before[: at + 1], after[: at + 1])
        differs = (before - after).abs().amax(dim=-1)[at + 1 :]
        assert (differs > 1e-5).any() if changes else (differs == 0).all(), (sees, at)
    if attention == FLASH:
        assert flash.calls[VARLEN] > 0
