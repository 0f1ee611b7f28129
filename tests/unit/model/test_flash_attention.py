"""FlashAttention 2, in plain torch, against SDPA: losses, every gradient, decoding; and how often the host waits."""

import flash_attn_stub
import pytest
import torch
from flash_attn_stub import DENSE, FLASH, VARLEN, FlashAttn, use_flash
from micro_batch import Waits, losses_of, stored_bytes
from random_samples import ragged_batch
from transformers import DynamicCache

from mirage_ds.data.collate import collate
from mirage_ds.self_check import NUM_FED, tiny_backbone, tiny_batch

SIZES = {"equal": [4, 4, 4], "ragged": [1, 6, 3], "long": [12, 2, 8]}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    return flash_attn_stub.install(monkeypatch)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_flash_attention_gives_the_losses_and_gradients_of_sdpa(make_model, flash: FlashAttn, stage: str, kind: str):
    """Rows of different lengths, padded on the left too where latents are aligned; with a trained tower."""
    model = make_model(stage, train_tower=True)
    samples = ragged_batch(2, 3, stage=stage, latent_sizes=SIZES[kind])
    expected, _ = losses_of(model, samples)
    wanted = gradients(model)
    assert sum(flash.calls.values()) == 0
    use_flash(model)
    found, _ = losses_of(model, samples)
    assert flash.calls[VARLEN] > 0
    assert (flash.calls[DENSE] > 0) == (stage != "stage2"), "a micro-batch of aligned rows is padded"
    assert found == pytest.approx(expected, rel=1e-6)
    for name, grad in gradients(model).items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
def test_no_mask_without_padding_on_the_left(make_model, flash: FlashAttn, recompute: bool) -> None:
    """One row, or rows that begin in one column: the dense function alone, in all passes."""
    model = make_model("stage2", recompute=recompute)
    samples = ragged_batch(4, 1, stage="stage2", latent_sizes=[4]) * 2
    samples[1] = vars_of(samples[1], tail=3)
    expected = losses_of(model, samples)
    use_flash(model)
    before = flash.calls[VARLEN]
    assert losses_of(model, samples) == pytest.approx(expected, rel=1e-5)
    assert flash.calls[VARLEN] - before == len(model.tower.visual.blocks)


def test_unpadded_keys_are_not_stored_in_every_pass(make_model, flash: FlashAttn) -> None:
    """Rows padded on the left: with a mask, FlashAttention's copies of all keys and values belong to each pass."""
    model = make_model("stage2")
    use_flash(model)
    few, many = (stored_bytes(model, ragged_batch(5, 2, stage="stage2", latent_sizes=[size] * 2)) for size in (2, 12))
    assert many < 1.3 * few, (few, many)  # ten more columns and their passes


def vars_of(sample, tail: int):
    """The sample without its last tokens: the row is padded on the right."""
    kept = {"input_ids", "labels", "latent_mask", "image_mask"}
    changes = {name: getattr(sample, name)[:-tail] for name in kept}
    return type(sample)(**(vars(sample) | changes | {"position_ids": sample.position_ids[:, :-tail]}))


def test_decoding_of_left_padded_rows(flash: FlashAttn) -> None:
    backbone, batch = tiny_backbone(), tiny_batch(answers=([], []))
    assert batch.left_padded

    def states() -> torch.Tensor:
        cache, mask, positions = DynamicCache(), batch.attention_mask, batch.position_ids
        embeds, hidden = backbone.embed_tokens(batch.input_ids), []
        for _ in range(1 + NUM_FED):
            hidden.append(backbone.step(embeds, positions, mask, cache))
            embeds, positions = hidden[-1][:, None], positions.amax(dim=(0, 2)).expand(3, -1)[..., None] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.stack(hidden)

    with torch.inference_mode():
        expected = states()
        backbone.hf.config._attn_implementation = FLASH
        torch.testing.assert_close(states(), expected, rtol=1e-5, atol=1e-5)
    assert flash.calls[VARLEN] > 0


def waits(model, samples) -> int:
    batch = collate(samples, align_latents=model.stage == "stage2")
    with Waits() as counted:
        model(batch).loss.backward()
    return counted.count


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_the_host_does_not_wait_for_the_device(make_model, flash: FlashAttn, stage: str, attention: str) -> None:
    """In a micro-batch without padding on the left; forward and backward, of any number of layers."""
    model = make_model(stage)
    if attention == FLASH:
        use_flash(model)
    assert waits(model, ragged_batch(4, 1, stage=stage, latent_sizes=[4])) == 0


def test_waits_are_counted(make_model) -> None:
    with Waits() as counted:
        bool(torch.ones(1)), torch.ones(2).nonzero(), torch.ones(2)[torch.ones(2).bool()], torch.ones(1).item()
    assert counted.count == 4
