"""Images that are hidden after a row's first latent block: against a plain loop with an explicit mask.

Losses to 1e-5, the gradient of every parameter to 1e-4 of its norm. See also test_changed_pixel.py.
"""

from dataclasses import replace
from functools import cache

import flash_attn_stub
import golden_set
import plain_loop
import pytest
import torch
from flash_attn_stub import FLASH, VARLEN, use_flash
from micro_batch import Waits, check_against, losses_of
from random_samples import ragged_batch, random_sample

from mirage_ds.data import collate as collation
from mirage_ds.data.alignment import aligned_columns, columns_from_left
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample

BLOCKS = [[], [2], [8, 2], [3, 1]]
HIDES = [True, True, True, False]
"""The last row is one that was not drawn."""
WAYS = {"stage1": columns_from_left, "stage2": aligned_columns, "stage2 from the left": columns_from_left}
CUTS = [*((way, rows) for way in ("stage1", "stage2") for rows in (1, 2, 4)), ("stage2 from the left", 4)]
PASSES = {
    "stage1": {1: [1, 2, 2, 1], 2: [2, 2], 4: [3]},
    "stage2": {1: [1, 4, 12, 5], 2: [4, 12], 4: [1 + 8 + 1 + 2]},  # a block of 8 has a latent where one of 2 ends
}
"""Of each micro-batch, by its number of rows."""


def samples_of(stage: str) -> list[EncodedSample]:
    samples = ragged_batch(11, len(BLOCKS), stage=stage, latent_sizes=BLOCKS)
    return [replace(each, hides_images=hides) for each, hides in zip(samples, HIDES, strict=True)]


@cache
def plain(stage: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the samples' losses, and its gradients, by transformers' names."""
    return plain_loop.summed(golden_set.MODEL, [vars(sample) for sample in samples_of(stage)], stage)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize(("way", "rows"), CUTS)
def test_losses_and_gradients_are_those_of_an_explicit_mask(
    make_model, monkeypatch: pytest.MonkeyPatch, way: str, rows: int, recompute: bool, attention: str
) -> None:
    monkeypatch.setattr(collation, "cheapest_columns", WAYS[way])
    stage = way.split()[0]
    model, samples = make_model(stage, recompute=recompute), samples_of(stage)
    parts = [samples[start : start + rows] for start in range(0, len(samples), rows)]
    batches = [collate(part, align_latents=stage == "stage2") for part in parts]
    passes = [model.rollout.num_passes(batch) for batch in batches]
    if way in PASSES:
        assert passes == PASSES[way][rows]
    if attention == FLASH:
        flash = flash_attn_stub.install(monkeypatch)
        use_flash(model)
    check_against(model, batches, plain(stage))
    if attention == FLASH:
        assert flash.calls[VARLEN] > 0


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_visible_images_give_other_losses(make_model, stage: str) -> None:
    """Otherwise the test above, whose tolerance is 1e-5, would say little."""
    visible = [replace(sample, hides_images=False) for sample in samples_of(stage)]
    loss, _ = losses_of(make_model(stage), visible)
    assert abs(loss - plain(stage)[0]) > 5e-4 * loss


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_more_passes_than_needed_change_nothing(make_model, stage: str) -> None:
    """Ranks that gather layer by layer agree on the largest number of passes among them."""
    model, samples = make_model(stage), samples_of(stage)
    expected = losses_of(model, samples)
    for num_passes in (13, collate(samples, align_latents=stage == "stage2").input_ids.shape[1]):
        assert losses_of(model, samples, num_passes) == pytest.approx(expected, rel=2e-5)


def test_rows_without_anything_to_hide_take_no_pass_more(make_model) -> None:
    """No images, or no blocks."""
    bare = random_sample(3, stage="stage1", images=0)
    for sample in (bare, samples_of("stage1")[0]):
        batch = collate([replace(sample, hides_images=True)], align_latents=False)
        assert (batch.hidden_from, batch.hide_columns) == (None, [])


def test_a_row_that_ends_with_its_latents(make_model) -> None:
    """As an answer that was cut off while it was decoded: there is no column from which on its images are hidden."""
    sample = replace(random_sample(3, stage="stage2", latent_size=4), hides_images=True)
    cut = int(sample.latent_mask.nonzero()[-1]) + 1
    names = ("input_ids", "labels", "latent_mask", "image_mask")
    sample = replace(
        sample, position_ids=sample.position_ids[:, :cut], **{name: getattr(sample, name)[:cut] for name in names}
    )
    batch = collate([sample], align_latents=True)
    assert (batch.hidden_from.tolist(), batch.hide_columns) == ([cut], [])
    model = make_model("stage2")
    assert losses_of(model, [sample]) == pytest.approx(losses_of(model, [replace(sample, hides_images=False)]))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_host_does_not_wait_for_the_device(make_model, stage: str) -> None:
    """With sdpa; FlashAttention looks for the hidden columns in every layer."""
    model, batch = make_model(stage), collate(samples_of(stage), align_latents=stage == "stage2")
    with Waits() as counted:
        model(batch).loss.backward()
    assert counted.count == 0
