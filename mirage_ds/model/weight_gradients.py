"""The weights' gradients of a rollout's passes of one column, computed together.

In backward, each pass would write a gradient as large as the weight and add it to those of the other passes: for one
column, the traffic of four readings of all weights. Here such a pass only leaves its inputs and the gradients of its
outputs, and one matrix product over the columns of all these passes is added to the gradient of the others.

Shape legend: B rows, I inputs and O outputs of a linear module.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Keep = Callable[[torch.Tensor, torch.Tensor], None]


class DeferredGradient:
    """The part of the gradient of one linear module's weight that comes from passes of one column.

    The first pass must not be deferred: it is upstream of all others, so that its gradient comes last.
    """

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module, self.weight = module, module.weight
        self.columns: list[tuple[torch.Tensor, torch.Tensor]] = []  # gradients of outputs [B, O], and inputs [B, I]
        module.weight.register_hook(self.add)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Stands in for the module's forward: [B, 1, I] -> [B, 1, O]."""
        if self.module.weight is not self.weight:  # then the hook is not called, and the gradient would lack passes
            raise RuntimeError("a weight of the decoder was replaced after the model was made")
        return KeptColumns.apply(inputs, self.module.weight, self.module.bias, self.keep)

    def keep(self, output_gradients: torch.Tensor, inputs: torch.Tensor) -> None:
        """Called in the backward of a deferred pass."""
        self.columns.append((output_gradients.flatten(0, 1), inputs.flatten(0, 1)))

    def add(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Called with the weight's gradient [O, I] of all other passes."""
        if not self.columns:
            return None
        output_gradients, inputs = map(torch.cat, zip(*self.columns, strict=True))
        self.columns.clear()
        return torch.addmm(gradient, output_gradients.T, inputs)


class KeptColumns(torch.autograd.Function):
    """A linear function that hands over the factors of its weight's gradient instead of computing it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, keep: Keep
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.keep = keep
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None, None]:
        (output_gradients,), (inputs, weight) = gradients, ctx.saved_tensors
        ctx.keep(output_gradients, inputs)
        bias_gradient = output_gradients.flatten(0, 1).sum(dim=0) if ctx.needs_input_grad[2] else None
        return output_gradients @ weight, None, bias_gradient, None


def deferred_gradients(layer: torch.nn.Module) -> list[DeferredGradient]:
    """For all linear modules of a layer whose weights are trained."""
    modules = (module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    return [DeferredGradient(module) for module in modules if module.weight.requires_grad]


@contextmanager
def deferring(gradients: Sequence[DeferredGradient]) -> Iterator[None]:
    """Inside it, these modules leave the gradients of their weights for later."""
    for each in gradients:
        each.module.forward = each.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for each in gradients:
            del each.module.forward
