"""A fixture that makes MirageModel from the golden set's small model."""

from collections.abc import Callable

import golden_set
import pytest
import torch

from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel

MakeModel = Callable[..., MirageModel]


@pytest.fixture
def make_model() -> MakeModel:
    """Makes a new small model for a stage; its transformers model is `model.hf`, outside the module tree."""

    def make(stage: str, *, recompute: bool = True, train_tower: bool = False) -> MirageModel:
        backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
        backbone.visual.requires_grad_(train_tower)
        weight = 0.1 if stage == "stage1" else 1.0
        model = MirageModel(backbone, stage=stage, ce_loss_weight=weight, recompute=recompute, train_tower=train_tower)
        object.__setattr__(model, "hf", backbone.hf)
        return model

    return make
