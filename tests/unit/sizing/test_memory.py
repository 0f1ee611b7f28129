"""What forward keeps of rows with several latent blocks, against the storages that are alive after it.

tests/distributed/test_plan_memory.py has the other kinds of memory, on the real engine.
"""

from dataclasses import replace

import golden_set
import pytest
import torch
from micro_batch import stored_bytes
from random_samples import ragged_batch, random_sample
from row_shapes import shape_of
from transformers import DynamicCache

from mirage_ds.config import Config, EvaluationConfig
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.sizing.memory import estimate_memory, kept_bytes, logit_bytes
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.sizing.workload import Row, Workload
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

ROWS, FP32 = 4, 4


def planned_and_measured(
    samples: list[EncodedSample], row: Row, checkpointing: str, stage: str = "stage2"
) -> tuple[int, int]:
    """Bytes that a micro-batch of such rows stores for backward, by the formulas; and of these samples."""
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": golden_set.MODEL, "activation_checkpointing": checkpointing},
            "data": {"shards": "unused"},
            "train": {"stage": stage, "max_steps": 1, "warmup_steps": 0, "micro_batch_size_per_gpu": ROWS},
        }
    )
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    model = MirageModel(backbone, stage=stage, ce_loss_weight=1.0, recompute=checkpointing == "full")
    sizes = model_sizes(config.model)
    logits = logit_bytes(sizes, ROWS * row.targets, FP32) // 2
    planned, measured = ROWS * kept_bytes(sizes, config, row, FP32) + logits, stored_bytes(model, samples)
    print(f"{[sample.latent_sizes for sample in samples]}, {checkpointing}: planned {planned}, measured {measured}")
    return planned, measured


@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("sizes", [[4], [2, 8], [8, 1, 3]], ids=str)
def test_what_forward_keeps(sizes: list[int], checkpointing: str) -> None:
    """Of rows that are alike, and so not padded."""
    sample = random_sample(7, stage="stage2", latent_size=sizes, images=2)
    planned, measured = planned_and_measured([sample] * ROWS, shape_of(sample, "stage2").row(), checkpointing)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_forward_keeps_of_hidden_images(stage: str, checkpointing: str) -> None:
    sample = replace(random_sample(7, stage=stage, latent_size=[8], images=2), hides_images=True)
    row = shape_of(sample, stage).row()
    planned, measured = planned_and_measured([sample] * ROWS, row, checkpointing, stage)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_padded_rows_keep_no_more(checkpointing: str) -> None:
    """Rows of other lengths and blocks are aligned: each is padded to all others, and no pass is without a mask."""
    samples = ragged_batch(3, ROWS, stage="stage2", latent_sizes=[[2, 8], [5], [3, 3, 3], [8]])
    assert collate(samples, align_latents=True).left_padded
    row = Workload([shape_of(sample, "stage2") for sample in samples], ROWS, "").largest_of(ROWS)
    planned, measured = planned_and_measured(samples, row, checkpointing)
    assert measured <= planned


def test_an_evaluation_takes_the_model_and_the_cache_of_a_batch() -> None:
    """Against the weights and the cache that exist; without a task nothing is counted."""
    num_rows, prompt, new = 3, 10, 6
    settings = {"task": "none", "rows": "unused", "batch_size": num_rows, "max_new_tokens": new}
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": golden_set.MODEL},
            "data": {"shards": "unused"},
            "train": {"stage": "text", "max_steps": 1, "warmup_steps": 0, "dtype": "fp32"},
            "evaluation": settings,
        }
    )
    backbone, cache = load_backbone(golden_set.MODEL, dtype=torch.float32), DynamicCache()
    columns = prompt + new
    with torch.no_grad():
        backbone.step(
            torch.randn(num_rows, columns, backbone.embed_tokens.embedding_dim),
            torch.arange(columns).expand(3, num_rows, columns),
            torch.ones(num_rows, columns, dtype=torch.bool),
            cache,
        )
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights = sum(parameter.nbytes for parameter in {*backbone.hf.parameters()})
    deepspeed_config = resolve_deepspeed_config(config)
    deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    row = Row(tokens=prompt, targets=1, patches=4)
    planned = estimate_memory(model_sizes(config.model), config, deepspeed_config, row, 2).evaluation
    assert weights + kept < planned < weights + 2 * kept + num_rows * prompt * backbone.vocab_size * FP32 * 2
    without = config.model_copy(update={"evaluation": EvaluationConfig()})
    assert estimate_memory(model_sizes(config.model), without, deepspeed_config, row, 2).evaluation == 0
