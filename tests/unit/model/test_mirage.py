"""MirageModel: parameter names, tied and frozen parameters, loss weights, compress strategies."""

import golden_set
import torch
from random_samples import random_sample

from mirage_ds.data.collate import collate
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel, hf_name


def test_names_map_to_those_of_transformers(make_model) -> None:
    """By identity: the parameter under our name is the one under theirs."""
    model = make_model("stage2")
    theirs = dict(model.hf.named_parameters())
    ours = dict(model.named_parameters())
    assert {hf_name(name) for name in ours} == set(theirs)
    assert all(theirs[hf_name(name)] is parameter for name, parameter in ours.items())


def test_a_tied_head_belongs_to_the_embeddings(tmp_path) -> None:
    """As part of a ZeRO-3 leaf module it would lose the embedding's gradient."""
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    backbone.hf.lm_head.weight = backbone.hf.model.language_model.embed_tokens.weight
    model = MirageModel(backbone, stage="stage1", ce_loss_weight=1.0)
    assert not any(parameter is backbone.embed_tokens.weight for parameter in model.rollout.parameters())
    assert model.rollout.head.weights[0] is backbone.embed_tokens.weight


def test_the_tower_is_frozen_by_default(make_model) -> None:
    samples = [random_sample(1, stage="stage1", images=1)]
    for train_tower in (False, True):
        model = make_model("stage1", train_tower=train_tower)
        model(collate(samples, align_latents=False)).loss.backward()
        trained = [parameter.grad is not None for parameter in model.tower.parameters()]
        assert all(trained) if train_tower else not any(trained)


def test_the_latent_loss_is_weighted(make_model) -> None:
    batch = collate([random_sample(2, stage="stage1")], align_latents=False)
    model = make_model("stage1")
    losses = model(batch)
    model.latent_loss_weight = 3.0
    weighted = model(batch)
    assert torch.allclose(weighted.loss - losses.loss, 2 * losses.latent_loss, rtol=1e-4)


def test_the_strategy_changes_the_latents(make_model) -> None:
    """18 patches for 4 latents: one strategy drops two patches, one drops none, one pools the cells of a grid."""
    batch = collate([random_sample(3, stage="stage1", latent_size=4)], align_latents=False)
    model = make_model("stage1")
    losses = []
    for strategy in ("average", "average_all", "grid"):
        model.compress_strategy = strategy
        losses.append(model(batch).latent_loss.item())
    assert len({round(loss, 6) for loss in losses}) == 3
