"""Packed rows against single rows and the plain loop: losses, gradients; and no sample sees another."""

from dataclasses import replace

import flash_attn_stub
import plain_loop
import pytest
import torch
from flash_attn_stub import use_flash
from micro_batch import LiveStorage, Waits
from random_samples import ragged_batch

from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.packing import collate_packed
from mirage_ds.model import packed
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.packed import ALIGNMENT, block_mask

ATTENTION = ("sdpa", "flash_attention_2")
LOSS, GRADIENT = 1e-5, 1e-4  # relative


@pytest.fixture(params=["text", "stage1"])
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ATTENTION)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "sdpa":
        flash_attn_stub.install(monkeypatch)
    return request.param


def make(make_model, stage: str, attention: str, **settings) -> MirageModel:
    model = make_model(stage, **settings)
    if attention != "sdpa":
        use_flash(model)
    return model


def step(model: MirageModel, batch: Batch) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradients of a micro-batch."""
    model.zero_grad()
    losses = model(batch)
    losses.loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.hf.named_parameters() if weight.grad is not None}
    return [loss.item() for loss in losses], grads


def plain_step(model: MirageModel, samples: list[EncodedSample]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same, one sample at a time, by the loop that shares nothing with the model."""
    model.hf.zero_grad()
    totals = torch.zeros(3)
    for sample in samples:
        ce_loss, latent_loss = plain_loop.sample_losses(model.hf, vars(sample), model.stage)
        loss = model.ce_loss_weight * ce_loss + latent_loss
        loss.backward()
        totals += torch.stack([loss, ce_loss, latent_loss]).detach()
    grads = {name: weight.grad.clone() for name, weight in model.hf.named_parameters() if weight.grad is not None}
    return totals.tolist(), grads


def assert_equal(found: tuple, expected: tuple) -> None:
    (losses, grads), (wanted_losses, wanted) = found, expected
    if wanted_losses[2] == 0:  # text has no latent loss
        assert losses[2] == 0
    assert losses == pytest.approx(wanted_losses, rel=LOSS)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= GRADIENT * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
def test_packed_samples_have_their_own_losses_and_gradients(make_model, stage: str, attention: str, recompute: bool):
    """Of any lengths, some without images, latents or labels; with a trained tower, so that every weight counts."""
    model = make(make_model, stage, attention, recompute=recompute, train_tower=True)
    for samples in (ragged_batch(1, 4, stage=stage, latent_sizes=[2, 8, 3, 1]), ragged_batch(3, 6, stage=stage)):
        found = step(model, collate_packed(samples))
        assert_equal(found, step(model, collate(samples, align_latents=False)))
        if attention == "sdpa":
            assert_equal(found, plain_step(model, samples))


def logits(model: MirageModel, samples: list[EncodedSample]) -> list[torch.Tensor]:
    """[tokens, V] of each packed sample."""
    states: list[torch.Tensor] = []
    hook = model.rollout.norm.register_forward_hook(lambda *arguments: states.append(arguments[-1]))
    with torch.no_grad():
        model(collate_packed(samples))
        hook.remove()
        whole = model.hf.lm_head(states[0][0])
    return list(whole.split([len(sample.input_ids) for sample in samples]))


def assert_apart(model: MirageModel, samples: list[EncodedSample], tolerance: float) -> None:
    """Another text and another image of one sample change its own logits alone."""
    before = logits(model, samples)
    for number, sample in enumerate(samples):
        ids = torch.where(sample.image_mask | sample.latent_mask, sample.input_ids, sample.input_ids.flip(0) % 900)
        changed = replace(sample, input_ids=ids, pixel_values=255 - sample.pixel_values)
        after = logits(model, [*samples[:number], changed, *samples[number + 1 :]])
        for other, (old, new) in enumerate(zip(before, after, strict=True)):
            deviation = (old - new).abs().max().item()
            assert deviation > 1e-3 if other == number else deviation <= tolerance, (number, other, deviation)


def test_no_sample_sees_another(make_model, stage: str, attention: str) -> None:
    """Not by a bit with sdpa."""
    samples = ragged_batch(4, 4, stage=stage, latent_sizes=[3, 4, 1, 2])
    assert_apart(make(make_model, stage, attention), samples, 0.0 if attention == "sdpa" else 1e-6)


def test_a_leak_is_noticed(make_model, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One end of a sample forgotten: two neighbours are one sample to attention."""
    apart = packed.apart
    monkeypatch.setattr(
        "mirage_ds.model.rollout.apart",
        lambda ends, longest, *others: apart(ends[1:], int(ends[1:].diff(prepend=torch.zeros(1)).max()), *others),
    )
    samples = ragged_batch(4, 4, stage="text", latent_sizes=[3, 4, 1, 2])
    model = make(make_model, "text", attention)
    with pytest.raises(AssertionError):
        assert_apart(model, samples, 1e-6)
    with pytest.raises(AssertionError):
        assert_equal(step(model, collate_packed(samples)), step(model, collate(samples, align_latents=False)))


def test_the_host_does_not_wait_for_the_device(make_model, stage: str, attention: str) -> None:
    model = make(make_model, stage, attention)
    batch = collate_packed(ragged_batch(4, 3, stage=stage, latent_sizes=[4, 2, 3]))
    with Waits() as waits:
        model(batch).loss.backward()
    assert waits.count == 0


def test_the_mask_is_stored_once(make_model) -> None:
    """Not by every layer, as a mask of bools would be."""
    model = make_model("text", recompute=False)
    batch = collate_packed(ragged_batch(6, 24, stage="text"))
    with LiveStorage() as live:
        losses = model(batch)
    masks = [size for ref, size in live.made.values() if not ref.expired() and size >= 4 * batch.num_tokens**2]
    losses.loss.backward()
    assert masks == [4 * batch.num_tokens * -(-batch.num_tokens // ALIGNMENT) * ALIGNMENT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_what_attention_on_a_gpu_takes_as_it_is(dtype: torch.dtype) -> None:
    """Of the queries' dtype, in rows that begin at multiples of 16 elements, for any number of columns."""
    mask = block_mask(torch.tensor([3, 21], dtype=torch.int32), 21, dtype)
    assert mask.shape == (1, 1, 21, 21)
    assert mask.dtype == dtype
    assert mask.stride(2) == 32
    assert (mask[0, 0, 4, :] == 0).nonzero().flatten().tolist() == [3, 4]


def test_fed_back_latents_are_refused(make_model) -> None:
    batch = collate_packed(ragged_batch(1, 2, stage="stage2", latent_sizes=[2, 2]))
    with pytest.raises(RuntimeError, match="only where no hidden state is fed back"):
        make_model("stage2")(batch)
