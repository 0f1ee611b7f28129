"""Rows of 0, 1, 2 and 3 latent blocks with their own K in one micro-batch, against single samples in the plain loop.

Losses to 1e-5, the gradient of every parameter to 1e-4 of its norm; and the number of passes that they take.
"""

from collections.abc import Sequence
from functools import cache

import flash_attn_stub
import golden_set
import plain_loop
import pytest
import torch
from flash_attn_stub import FLASH, VARLEN, use_flash
from micro_batch import check_against
from random_samples import ragged_batch

from mirage_ds.batch import Batch
from mirage_ds.data import collate as collation
from mirage_ds.data.alignment import aligned_columns, columns_from_left
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.rollout import Rollout

BLOCKS = [[], [2], [8, 2], [2, 8, 2]]
ALIGNED_PASSES = {1: [1, 3, 11, 13], 2: [3, 19], 4: [1 + 8 + 8 + 2]}
"""Of each micro-batch, by its number of rows: for each ordinal the largest K, and one."""
WAYS = {"aligned": aligned_columns, "from the left": columns_from_left}


def samples_of(stage: str) -> list[EncodedSample]:
    return ragged_batch(13, len(BLOCKS), stage=stage, latent_sizes=BLOCKS)


@cache
def plain(stage: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the samples' losses, and its gradients, by transformers' names."""
    return plain_loop.summed(golden_set.MODEL, [vars(sample) for sample in samples_of(stage)], stage)


def micro_batches(stage: str, rows: int) -> list[Batch]:
    samples = samples_of(stage)
    parts = [samples[start : start + rows] for start in range(0, len(samples), rows)]
    return [collate(part, align_latents=stage == "stage2") for part in parts]


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_fed_back_blocks(
    make_model, monkeypatch: pytest.MonkeyPatch, way: str, rows: int, recompute: bool, attention: str
) -> None:
    """Stage 2; in columns that are aligned, with padding between the tokens of a row, and in the union of columns."""
    monkeypatch.setattr(collation, "cheapest_columns", WAYS[way])
    model = make_model("stage2", recompute=recompute)
    batches = micro_batches("stage2", rows)
    passes = [model.rollout.num_passes(batch) for batch in batches]
    if way == "aligned":
        assert passes == ALIGNED_PASSES[rows]
        assert [batch.left_padded for batch in batches] == [rows > 1] * len(batches)
    else:
        assert [batch.left_padded for batch in batches] == [False] * len(batches)
        assert rows == 1 or sum(passes) > sum(ALIGNED_PASSES[rows])
    if attention == FLASH:
        flash = flash_attn_stub.install(monkeypatch)
        use_flash(model)
    check_against(model, batches, plain("stage2"))
    if attention == FLASH and way == "aligned" and rows > 1:
        assert flash.calls[VARLEN] > sum(passes)


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_grounded_blocks(
    make_model, monkeypatch: pytest.MonkeyPatch, rows: int, recompute: bool, attention: str
) -> None:
    """Stage 1: each helper image is pooled to the K of its block."""
    batches = micro_batches("stage1", rows)
    assert [size for batch in batches for size in batch.latent_sizes] == [size for sizes in BLOCKS for size in sizes]
    model = make_model("stage1", recompute=recompute)
    if attention == FLASH:
        flash_attn_stub.install(monkeypatch)
        use_flash(model)
    check_against(model, batches, plain("stage1"))


class DetachedRollout(Rollout):
    """A rollout whose last row's states are fed back without their gradient in some passes."""

    def one_pass(self, hidden, past, *arguments, **keywords):
        number = self.passes = getattr(self, "passes", -1) + 1
        output = super().one_pass(hidden, past, *arguments, **keywords)
        return torch.cat([output[:-1], output[-1:].detach()]) if number in self.detached else output


@pytest.mark.parametrize(("detached", "right"), [((), True), ((12,), False), (range(9, 16), False)], ids=str)
def test_a_detached_latent_in_the_second_block_is_seen(make_model, detached: Sequence[int], right: bool) -> None:
    """Passes 9 to 16 begin at the eight latents of the last row's second block. The states of the first seven are only
    fed back: without their gradient the loss is the same, the gradients are not."""
    model, batches = make_model("stage2"), micro_batches("stage2", 4)
    second_block = batches[0].latent_mask[-1].nonzero().flatten()[2:10]
    assert second_block.tolist() == batches[0].latent_columns[8:16]
    model.rollout.__class__ = DetachedRollout
    model.rollout.detached = detached
    if right:
        check_against(model, batches, plain("stage2"))
        return
    with pytest.raises(AssertionError, match="language_model"):
        check_against(model, batches, plain("stage2"))
    model.rollout.passes = -1
    assert model(batches[0]).loss.item() == pytest.approx(plain("stage2")[0], rel=1e-5)
