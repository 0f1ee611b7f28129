"""The model against the reference's numbers: every sample, both stages, with and without activation checkpointing.

Tolerances are those that the set's README suggests; ids and masks are exact. Gradients matter most: detaching a latent
does not change the loss.
"""

from typing import Any

import golden_set
import pytest
import torch
from deviations import check

from mirage_ds.data.collate import collate
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import Losses, MirageModel
from mirage_ds.model.targets import latent_targets

LOSS, LOGIT, LOGPROB, TENSOR, NORM = 1e-5, 1e-4, 1e-4, 1e-4, 1e-4
STAGES = ("stage1", "stage2")
# Rows of the embedding and the head whose gradients are stored, in this order.
STORED_ROWS = ("latent_pad", "latent_start", "latent_end", "nl", "im_end")


class Result:
    """The outputs of the model for one sample, with everything that is compared."""

    def __init__(self, index: int, stage: str, recompute: bool) -> None:
        backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
        weight = 0.1 if stage == "stage1" else 1.0
        model = MirageModel(backbone, stage=stage, ce_loss_weight=weight, recompute=recompute)
        model.rollout.register_forward_hook(lambda module, inputs, output: setattr(self, "hidden", output[0][0]))
        batch = collate([golden_set.encoded(index, stage)], align_latents=stage == "stage2")
        self.index, self.stage = index, stage
        self.facts: dict[str, Any] = golden_set.samples()[index]
        self.losses: Losses = model(batch)
        self.losses.loss.backward()
        self.hidden: torch.Tensor = self.hidden.detach()
        self.logits = backbone.hf.lm_head(self.hidden).detach()
        self.inputs = batch
        self.model = model
        self.grads = {old_name(name): p.grad for name, p in backbone.hf.named_parameters() if p.requires_grad}

    def named(self, quantity: str) -> str:
        """The quantity's name in the table of deviations."""
        return f"{self.stage}: {quantity}"

    def stored(self, name: str) -> torch.Tensor:
        return golden_set.tensors("golden")[f"{self.index}.{self.stage}.{name}"]


def old_name(name: str) -> str:
    """transformers 5's parameter name -> the reference's."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((sample["index"], stage, recompute), id=f"{sample['index']}-{stage}-{name}")
        for stage in STAGES
        for recompute, name in ((False, "stored"), (True, "recomputed"))
        for sample in golden_set.samples()
    ],
)
def result(request: pytest.FixtureRequest) -> Result:
    return Result(*request.param)


def test_losses(result: Result) -> None:
    reference = result.facts[result.stage]
    check(result.named("loss"), result.losses.loss, reference["total"], LOSS, "relative")
    check(result.named("text loss"), result.losses.ce_loss, reference["ce"], LOSS, "relative")
    if result.stage == "stage1":
        check(result.named("latent loss"), result.losses.latent_loss, reference["sim"], LOSS, "relative")
    else:
        assert result.losses.latent_loss == 0


def test_logits(result: Result) -> None:
    """Label log-probabilities of every sample, all logits where the set has them, and their sums."""
    positions, ids = result.stored("label_pos").long(), result.stored("label_id").long()
    logprobs = result.logits.log_softmax(-1)[positions, ids]
    check(result.named("label log-probabilities"), logprobs, result.stored("label_logprob"), LOGPROB, "absolute")
    torch.testing.assert_close(result.inputs.target_rows, positions)
    torch.testing.assert_close(result.inputs.target_ids, ids)
    if f"{result.index}.{result.stage}.logits" in golden_set.tensors("golden"):
        stored = result.stored("logits").reshape_as(result.logits)
        check(result.named("logits"), result.logits, stored, LOGIT, "absolute")
    sums = result.facts[result.stage]["logits"]
    name = result.named("sums of logits (squares, absolutes)")
    logits = result.logits.double()
    check(name, [logits.square().sum(), logits.abs().sum()], [sums["sq_sum"], sums["abs_sum"]], 1e-5, "relative")


def test_latents(result: Result) -> None:
    """Stage 1: the pooled targets and their predictions. Stage 2: the states that are fed back."""
    positions = torch.tensor(result.facts["latent_positions"])
    before = result.hidden[positions - 1]
    if result.stage == "stage2":
        check(result.named("latents fed back"), before, result.stored("latents"), TENSOR, "relative to the largest")
        return
    with torch.no_grad():
        _, helper = result.model.tower.encode(result.inputs)
        targets = latent_targets(helper, result.inputs, "average", torch.float32).targets
    check(result.named("latent targets"), targets, result.stored("targets"), TENSOR, "relative to the largest")
    check(result.named("latent predictions"), before, result.stored("predictions"), TENSOR, "relative to the largest")


def test_gradient_norms(result: Result) -> None:
    """Of every parameter and in total; the frozen tower has none."""
    reference = result.facts[result.stage]["grad_norm"]
    assert set(result.grads) == set(reference)
    norms = {name: result.grads[name].norm() for name in reference}
    for name, norm in reference.items():
        check(result.named("gradient norm of each parameter"), norms[name], norm, NORM, "relative", name)
    total, expected = torch.stack(list(norms.values())).norm(), result.facts[result.stage]["grad_norm_total"]
    check(result.named("gradient norm, total"), total, expected, NORM, "relative")


def test_stored_gradients(result: Result) -> None:
    prefix = f"{result.index}.{result.stage}.grad."
    names = [name.removeprefix(prefix) for name in golden_set.tensors("golden") if name.startswith(prefix)]
    assert names
    quantity = result.named("gradients")
    for name in names:
        check(quantity, result.grads[name], result.stored(f"grad.{name}"), TENSOR, "relative to the largest", name)
    ids = golden_set.numbers("golden")["ids"]
    rows = torch.tensor([ids[token] for token in STORED_ROWS])
    quantity = result.named("gradient rows of the embedding and the head")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored = result.stored(f"grad_rows.{name}")
        check(quantity, result.grads[name][rows], stored, TENSOR, "relative to the largest", name)


def test_latent_pad_row_gets_exactly_no_gradient(result: Result) -> None:
    pad = golden_set.numbers("golden")["ids"]["latent_pad"]
    assert not result.grads["model.embed_tokens.weight"][pad].any()
