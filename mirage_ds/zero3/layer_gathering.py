"""Gathers groups of decoder layers by themselves, without DeepSpeed's hooks: see model/layer_groups.py."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from mirage_ds.model.rollout import Rollout


def gather(weights: Sequence[Any]) -> list[Any]:
    """Begins to gather those that are not there; returns what to wait for.

    With `zero_hpz_partition_size` trained weights get a second shard and frozen ones do not, and DeepSpeed asks the
    first of a list which all of it have (DS:runtime/zero/partition_parameters.py, all_gather_coalesced).
    """
    absent = [weight for weight in weights if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    kinds = [[weight for weight in absent if (weight.ds_secondary_tensor is None) == once] for once in (True, False)]
    return [kind[0].all_gather_coalesced(kind) for kind in kinds if kind]


class UnderWay(NamedTuple):
    """A gather that has begun."""

    group: int
    handles: list[Any]


class LayerGathering:
    """At most two groups are there: the one in use, and the next one, which is gathered meanwhile."""

    def __init__(self, groups: Sequence[torch.nn.ModuleList]) -> None:
        """
        Args:
            groups: of layers; every rank uses them in the same order.
        """
        self.weights: list[list[Any]] = [list(group.parameters()) for group in groups]
        self.current: int | None = None
        self.under_way: UnderWay | None = None

    @torch.no_grad()
    def use(self, group: int, following: int | None) -> None:
        """Returns when the group's weights are there; begins to gather those of `following`."""
        if group != self.current:
            self.release_current()
            if self.under_way is None:
                self.begin(group)
            self.arrive(group)
        if following is not None and following != group and self.under_way is None:
            self.begin(following)

    @torch.no_grad()
    def release(self) -> None:
        """Releases all that is gathered."""
        self.release_current()
        if self.under_way is not None:
            self.arrive(self.under_way.group)
            self.release_current()

    def begin(self, group: int) -> None:
        self.under_way = UnderWay(group, gather(self.weights[group]))

    def arrive(self, group: int) -> None:
        """Waits for the gather under way."""
        begun, self.under_way = self.under_way, None
        if begun is None or begun.group != group:
            raise RuntimeError(f"group {group} of the decoder is needed, and {begun} is under way")
        for handle in begun.handles:
            handle.wait()
        self.current = group

    def release_current(self) -> None:
        if self.current is not None:
            # DeepSpeed keeps small weights everywhere.
            gathered = [weight for weight in self.weights[self.current] if not weight.ds_persist]
            if gathered:
                gathered[0].partition(gathered)
        self.current = None


def gather_groups(rollout: Rollout) -> None:
    """Takes DeepSpeed's hooks off the decoder layers, and gathers their groups instead.

    To be called after DeepSpeed has put its hooks on; those of others stay.
    """
    for module in (part for layer in rollout.layers for part in layer.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook.__module__.startswith("deepspeed."):
                    del hooks[key]
    rollout.gathering = LayerGathering(rollout.grouped_layers())
