"""The keys and values of earlier passes, as separate parts, and what a layer that is not recomputed stores of them.

Shape legend: B rows, Q columns of one pass, H key-value heads.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

KeyValue = tuple[torch.Tensor, torch.Tensor]  # each [B, H, Q, head dimension]
Geometry = tuple[Callable[[], torch.Tensor], torch.Size, tuple[int, ...]]


class PartsCache:
    """The part of transformers' cache interface that a decoder layer uses, for one layer and one pass.

    Past keys and values stay separate parts, one per pass. They are joined only inside the layer, so that a joined copy
    is never stored for backward: activation checkpointing joins them again, and so does `Remade`.
    """

    def __init__(self, past: Sequence[KeyValue]) -> None:
        self.past = past
        self.new: KeyValue | None = None
        self.joined: tuple[torch.Tensor, ...] = ()  # this pass's copies of all parts, while the layer runs

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> KeyValue:
        """Keeps this pass's part and returns past and new together (transformers' `Cache.update`).

        Versions of transformers pass different further arguments, which only its own kinds of cache read.
        """
        self.new = (key, value)
        if not self.past:
            return self.new
        keys, values = zip(*self.past, self.new, strict=True)
        joined = self.joined = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        return joined


def remade_hooks(layer: torch.nn.Module, cache: PartsCache) -> saved_tensors_hooks:
    """The hooks of `Remade`, for one forward of the layer."""
    remade = Remade(layer, cache)
    return saved_tensors_hooks(remade.pack, remade.unpack)


class Remade:
    """Autograd's hooks for a layer that is not recomputed: what backward can make again is not stored.

    That is the joined keys and values, of which every pass would store its own copy, and the weights: ZeRO-3 may
    release them after forward and gather them elsewhere, and a stored reference would keep the first copy.
    """

    def __init__(self, layer: torch.nn.Module, cache: PartsCache) -> None:
        self.cache = cache
        # Those that are there before the layer runs. Others, which are gathered only while it runs, may leave their
        # memory to an activation, which would then be taken for a weight.
        self.weights = {weight.data_ptr(): weight for weight in layer.parameters() if weight.numel()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Geometry:
        """What is stored instead of `tensor`: itself, or how to make it again."""
        address = tensor.data_ptr()
        if address in self.weights:
            return self.weights[address].detach, tensor.shape, tensor.stride()
        for number, joined in enumerate(self.cache.joined):
            if address == joined.data_ptr():
                # Detached: a stored part would refer to the graph that stores it.
                parts = [part[number].detach() for part in (*self.cache.past, self.cache.new) if part]
                return partial(torch.cat, parts, dim=2), tensor.shape, tensor.stride()
        return tensor

    @staticmethod
    def unpack(stored: torch.Tensor | Geometry) -> torch.Tensor:
        """The tensor, made again in the shape and the strides in which it was used."""
        if isinstance(stored, torch.Tensor):
            return stored
        make, shape, strides = stored
        whole = make()
        return whole.as_strided(shape, strides, whole.storage_offset())
