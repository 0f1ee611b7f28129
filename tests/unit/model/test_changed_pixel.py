"""Hidden images in training: a pixel that changes after a row's first latent block changes no later logit.

Up to the block a row is computed with its images. From there on it finds, at the columns of its images, the keys and
values of all layers that the same row has with one other pixel in each image; at all other columns its own.
"""

from dataclasses import replace
from pathlib import Path

import flash_attn_stub
import pytest
import torch
from flash_attn_stub import FLASH, VARLEN, use_flash
from generated_rows import image_bytes, other_pixel, write_rows

from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.rows import Sample
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.parts_cache import KeyValue
from mirage_ds.model.rollout import Rollout

HELPER = image_bytes((84, 112), seed=9)
SAMPLES = [
    Sample("0", "<image>Where to?", "Look: <output_image>So left.", (image_bytes(seed=1),), (HELPER,)),
    Sample(
        "1", "Is <image> like <image>?", "<output_image>a<output_image>b", (image_bytes(seed=2),) * 2, (HELPER,) * 2
    ),
]
"""In stage 1 their first blocks end in different columns."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed-pixel")
    write_tiny(write_rows(folder / "rows"), folder / "model", seed=0)
    return folder / "model"


class Exchanged(Rollout):
    """A rollout that keeps its keys and values; its rows find `others` at their images from the column `begins` on."""

    images: torch.Tensor  # [B, L] bool
    begins: torch.Tensor  # [B]
    others: list[KeyValue] | None  # of each layer, [B, H, L, head dimension]

    def one_pass(self, hidden, past, *arguments, **keywords):
        held = sum(key.shape[2] for key, _ in past[0])
        if self.others is not None and held:
            is_other = (self.images & (self.begins <= held)[:, None])[:, None, :held, None]
            for parts, others in zip(past, self.others, strict=True):
                pairs = zip(joined(parts), others, strict=True)
                parts[:] = [tuple(torch.where(is_other, other[:, :, :held], own) for own, other in pairs)]
        self.kept = past
        return super().one_pass(hidden, past, *arguments, **keywords)


def joined(parts: list[KeyValue]) -> KeyValue:
    return tuple(torch.cat(each, dim=2) for each in zip(*parts, strict=True))


@torch.no_grad()
def logits(model: MirageModel, batch: Batch, others: list[KeyValue] | None = None) -> torch.Tensor:
    """[B, L, V], in the passes of training."""
    states: list[torch.Tensor] = []
    model.rollout.others = others
    hook = model.rollout.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    model(batch)
    hook.remove()
    return model.hf.lm_head(states[0])


@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_pixel_that_changes_after_the_block_changes_no_later_logit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, attention: str
) -> None:
    encoder = load_encoder(str(folder), stage=stage, latent_size=3, answer_sees_image=False)
    changed_samples = [replace(each, input_images=tuple(map(other_pixel, each.input_images))) for each in SAMPLES]
    own, changed = (
        collate([encoder(each) for each in samples], align_latents=stage == "stage2")
        for samples in (SAMPLES, changed_samples)
    )
    assert 0 < (own.pixel_values != changed.pixel_values).sum() <= 3 * 3  # colours, images
    assert len(own.hide_columns) == {"stage1": 2, "stage2": 1}[stage]
    backbone = load_backbone(str(folder), dtype=torch.float32)
    model = MirageModel(backbone, stage=stage, ce_loss_weight=1.0)
    object.__setattr__(model, "hf", backbone.hf)
    if attention == FLASH:
        flash = flash_attn_stub.install(monkeypatch)
        use_flash(model)
    model.rollout.__class__ = Exchanged
    model.rollout.images, model.rollout.begins = own.image_mask, own.hidden_from
    for hides in (True, False):  # without hidden images, in the same passes
        seen = {} if hides else {"hidden_from": None}
        logits(model, replace(changed, **seen))
        others = [joined(parts) for parts in model.rollout.kept]
        before, after = (logits(model, replace(own, **seen), each) for each in (None, others))
        for row, begin in enumerate(own.hidden_from.tolist()):
            assert torch.equal(before[row, :begin], after[row, :begin])
            tokens = own.attention_mask[row, begin:]
            differs = (before[row, begin:] - after[row, begin:]).abs().amax(dim=-1)[tokens]
            assert (differs == 0).all() if hides else (differs > 1e-3).all()
    if attention == FLASH:
        assert flash.calls[VARLEN] > 0
