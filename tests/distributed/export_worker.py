"""One rank of test_exported_runs.py: trains a few steps, saves, and stores the model's weights and outputs.

For each run FOLDER/NAME is its folder, and FOLDER/NAME.pt has, from the ZeRO-3 engine itself, every parameter gathered
by DeepSpeed, and input, hidden states and logits of one forward pass over text and an image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import plain_loop
import torch
from dealt import in_order

from mirage_ds.batch import Batch
from mirage_ds.checkpoint.facts import describe_run
from mirage_ds.checkpoint.save import Saves
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.rows import read_rows
from mirage_ds.data.steps import Share
from mirage_ds.model.backbone import DTYPES, load_backbone
from mirage_ds.model.mirage import MirageModel, hf_name
from mirage_ds.patch_grid import MERGE_SIZE
from mirage_ds.train_state import TrainState
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import (
    initialize,
    mark_gather_units,
    parameter_groups,
)


def batches(config: Config, rows: Path, stage: str) -> Iterator[Batch]:
    """This rank's rows, one per micro-batch."""
    encoder = load_encoder(config.model.path, stage=stage, latent_size=config.model.latent_size)
    samples = [encoder(sample) for _, sample in read_rows(rows)]
    for sample in samples[distributed.rank() :: distributed.world_size()]:
        yield collate([sample], align_latents=stage == "stage2")


def what_it_computes(engine: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """One forward pass of the engine; logits from its hidden states, as the loss head makes them."""
    hidden: list[torch.Tensor] = []
    hook = engine.module.rollout.register_forward_hook(lambda module, inputs, output: hidden.append(output[0].detach()))
    engine(batch=batch, num_passes=1)
    hook.remove()
    head = engine.module.rollout.head.weights[0]
    with deepspeed.zero.GatheredParameters([head]), torch.no_grad():
        logits = torch.nn.functional.linear(hidden[0], head)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": plain_loop.normalized(vars(batch)),
        "image_grid_thw": torch.tensor([(1, MERGE_SIZE * rows, MERGE_SIZE * cols) for rows, cols in batch.image_grids]),
        "logits": logits,
    }


def run(settings: dict[str, Any], folder: Path, rows: Path, device: torch.device) -> None:
    name = settings.pop("name")
    config = Config.model_validate(settings)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    deepspeed_config = resolve_deepspeed_config(config)
    backbone = load_backbone(
        config.model.path,
        dtype=DTYPES[config.train.dtype],
        deepspeed_config=deepspeed_config,
    )
    train_tower = config.model.train_tower
    backbone.visual.requires_grad_(train_tower)
    model = MirageModel(backbone, stage=config.train.stage, ce_loss_weight=1.0, train_tower=train_tower)
    mark_gather_units(model, config)
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    steps, world_size = config.train.max_steps, distributed.world_size()
    metrics = Metrics(
        config.run.dir, stage=config.train.stage, global_batch_size=world_size, max_steps=steps, log_freq=steps
    )
    stream, state = batches(config, rows, config.train.stage), TrainState()
    trainer = Trainer(
        engine,
        stream,
        in_order(Share(distributed.rank(), world_size, 1)),
        config.train,
        metrics,
        state,
        max_steps=steps,
        device=device,
        agree_on_passes=False,
        early_end=EarlyEnd(end_s=None, margin_s=0),
    )
    trainer.train()
    metrics.close()
    Saves(engine, config, describe_run(config, deepspeed_config, "unused", steps)).save(state, wait=True)
    # Without latents, so that a model without support for them computes the same.
    computed = what_it_computes(engine, next(batches(config, rows, "text")).to(device))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        computed["parameters"] = {hf_name(key): value.detach().clone() for key, value in model.named_parameters()}
    if distributed.is_main():
        torch.save(computed, folder / f"{name}.pt")
    engine.destroy()


def main(runs: list[dict[str, Any]], folder: Path) -> None:
    device = distributed.init(timeout_s=300)
    for settings in runs:
        run(settings, folder, folder / "rows" / "rows.jsonl", device)
    distributed.shut_down()
