"""What forward keeps of rows with several latent blocks, against the storages that are alive after it.

tests/distributed/test_plan_memory.py has the other kinds of memory, on the real engine.
"""

import golden_set
import pytest
import torch
from micro_batch import stored_bytes
from random_samples import random_sample
from row_shapes import shape_of

from mirage_ds.config import Config
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.sizing.memory import kept_bytes, logit_bytes
from mirage_ds.sizing.model_sizes import model_sizes

ROWS, FP32 = 4, 4


@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("sizes", [[4], [2, 8], [8, 1, 3]], ids=str)
def test_what_forward_keeps(sizes: list[int], checkpointing: str) -> None:
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": golden_set.MODEL, "activation_checkpointing": checkpointing},
            "data": {"shards": "unused"},
            "train": {"stage": "stage2", "max_steps": 1, "warmup_steps": 0, "micro_batch_size_per_gpu": ROWS},
        }
    )
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    model = MirageModel(backbone, stage="stage2", ce_loss_weight=1.0, recompute=checkpointing == "full")
    sample = random_sample(7, stage="stage2", latent_size=sizes, images=2)
    row, model_size = shape_of(sample, "stage2").row(), model_sizes(config.model)
    logits = logit_bytes(model_size, ROWS * row.targets, FP32) // 2
    planned = ROWS * kept_bytes(model_size, config, row, FP32) + logits
    measured = stored_bytes(model, [sample] * ROWS)
    print(f"{sizes}, {checkpointing}: planned {planned}, measured {measured}")
    assert planned == pytest.approx(measured, rel=0.1)
