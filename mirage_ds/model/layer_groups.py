"""Groups of decoder layers whose weights are there only while a pass uses them, in forward and in backward.

Several passes use the same layers, each with the keys and values of the earlier ones. ZeRO-3's own hooks count on one
forward of a module per backward: of several, they release the weights after the wrong one. Here each use of a group by
a pass lies between two nodes of autograd, `Entered` and `Left`, which see all that goes in and comes out:

    forward    Entered: gather       layers of the group       Left: -
    backward   Entered: -            layers of the group       Left: gather

`Left` runs its backward once the gradients of all outputs are there, those of keys and values from later passes too;
`Entered` runs it once the group's layers are differentiated. A group is released when another one is needed.

Shape legend: B rows, Q columns of one pass, D hidden, H key-value heads.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from mirage_ds.model.parts_cache import KeyValue


class Gathering(Protocol):
    """Whoever has the weights."""

    def use(self, group: int, following: int | None) -> None:
        """Returns when the group's weights are there; `following` is needed next."""

    def release(self) -> None:
        """Nothing is needed any more."""


class Visit(NamedTuple):
    """One use of a group by one pass."""

    gathering: Gathering | None  # None: the weights are there all the time
    group: int
    next_forward: int | None  # the group that is needed after it
    next_backward: int | None

    def enter(self, hidden: torch.Tensor, past: Sequence[Sequence[KeyValue]]) -> tuple[torch.Tensor, list[Any]]:
        """Inputs [B, Q, D] and the past parts of each of the group's layers; returns the same."""
        if self.gathering is None:
            return hidden, list(past)
        hidden, *flat = Entered.apply(self, self.gathering, hidden, *chain.from_iterable(chain.from_iterable(past)))
        tensors = iter(flat)
        return hidden, [[(next(tensors), next(tensors)) for _ in parts] for parts in past]

    def leave(self, hidden: torch.Tensor, new: Sequence[KeyValue]) -> tuple[torch.Tensor, list[KeyValue]]:
        """Outputs [B, Q, D] and each layer's keys and values of this pass; returns the same."""
        if self.gathering is None:
            return hidden, list(new)
        hidden, *flat = Left.apply(self, self.gathering, hidden, *chain.from_iterable(new))
        return hidden, list(zip(flat[::2], flat[1::2], strict=True))


def visits(gathering: Gathering | None, num_groups: int, num_passes: int) -> list[list[Visit]]:
    """The uses of all groups, pass by pass."""
    order = [group for _ in range(num_passes) for group in range(num_groups)]
    uses = [
        Visit(gathering, group, following, before)
        for group, following, before in zip(order, [*order[1:], None], [None, *order[:-1]], strict=True)
    ]
    return [uses[start : start + num_groups] for start in range(0, len(uses), num_groups)]


class Entered(torch.autograd.Function):
    """Hands its tensors on to a group's layers."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, gathering: Gathering, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.visit, ctx.gathering = visit, gathering
        ctx.set_materialize_grads(False)
        gathering.use(visit.group, visit.next_forward)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.visit.next_backward is None:
            ctx.gathering.release()
        return (None, None, *gradients)


class Left(torch.autograd.Function):
    """Takes its tensors from a group's layers."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, gathering: Gathering, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.visit, ctx.gathering = visit, gathering
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.gathering.use(ctx.visit.group, ctx.visit.next_backward)
        return (None, None, *gradients)
