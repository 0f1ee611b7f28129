"""The independent loop of tests/plain_loop.py over a model of plain peft, and over one of which parts are frozen.

It does not use mirage_ds.
"""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import plain_loop
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2_5_VLForConditionalGeneration

SEED = 42  # the default of run.seed


def load(folder: str) -> Any:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    return model


def with_adapter(folder: str, **settings: Any) -> Any:
    """A model with a new adapter in it; A is drawn as peft draws it after this seed."""
    model = load(folder)
    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(lora_dropout=0.0, **settings)).base_model.model


def frozen(folder: str, patterns: list[str], *, train_merger: bool) -> Any:
    model = load(folder)
    model.model.visual.merger.requires_grad_(train_merger)
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    return model


def train(
    make: Callable[[], Any], global_batches: list[list[plain_loop.Sample]], stage: str, **settings: Any
) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and what training has changed, by peft's names of parameters."""
    model = make()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    done = plain_loop.train_model(model, global_batches, stage, **settings)
    changes = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return {**done, "changes": changes, "before": before}
