"""All weights of a model on every rank at once, so that a rank can compute with it while the others do something else.

DeepSpeed's own `unwrap_model_for_generation` takes its hooks off and registers them again. Then they come after those
of the run (`gather_tower` must come first, the step's clock last), the recorded order of the modules is thrown away,
small weights that are always kept are dropped, and after an exception there are no hooks at all. Here all hooks are set
aside, and DeepSpeed does not notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


@contextmanager
def whole_model(module: torch.nn.Module) -> Iterator[None]:
    """Inside it every rank has all weights of `module`, and its modules compute without any collective.

    All ranks enter it together, between two optimizer steps or before the first one, with no forward or backward under
    way: then DeepSpeed has nothing gathered but small weights, which it always keeps. Leaving it takes no collective,
    so a rank may leave by an exception.
    """
    weights: list[Any] = list(module.parameters())
    if any(weight.ds_status == ZeroParamStatus.INFLIGHT for weight in weights):
        raise RuntimeError(
            "DeepSpeed gathers weights right now; the whole model can only be gathered between two steps"
        )
    absent = [weight for weight in weights if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with GatheredParameters(absent), without_hooks(module):
        yield


@contextmanager
def without_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Inside it no forward hook of `module` and its parts is called; after it they are as before, in their order."""
    tables = [table for each in module.modules() for table in (each._forward_pre_hooks, each._forward_hooks)]
    aside = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, aside, strict=True):
            table.update(hooks)
