"""Which weights are gathered together, and that all of them are released; with weights that only keep their state."""

from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from mirage_ds.zero3.layer_gathering import LayerGathering, gather, gather_groups

AVAILABLE, NOT_AVAILABLE = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE


class Weight:
    """DeepSpeed's part of a parameter."""

    def __init__(self, log: list[list["Weight"]], second: object = None) -> None:
        self.ds_status, self.ds_persist, self.ds_secondary_tensor, self.log = NOT_AVAILABLE, False, second, log

    def all_gather_coalesced(self, weights: list["Weight"]) -> "Handle":
        self.log.append(weights)
        return Handle(weights)

    def partition(self, weights: list["Weight"]) -> None:
        for weight in weights:
            weight.ds_status = NOT_AVAILABLE


class Handle:
    """A gather of DeepSpeed's."""

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights

    def wait(self) -> None:
        for weight in self.weights:
            weight.ds_status = AVAILABLE


def test_weights_with_a_second_shard_are_gathered_by_themselves() -> None:
    log: list[list[Weight]] = []
    once, twice = [Weight(log) for _ in range(2)], [Weight(log, "second") for _ in range(2)]
    for handle in gather([once[0], twice[0], once[1], twice[1]]):
        handle.wait()
    assert log == [once, twice]
    assert {weight.ds_status for weight in once + twice} == {AVAILABLE}
    assert gather(once) == []


def test_all_is_released_while_the_next_group_is_under_way() -> None:
    log: list[list[Weight]] = []
    gathering = LayerGathering([torch.nn.ModuleList(), torch.nn.ModuleList()])
    gathering.weights = [[Weight(log)], [Weight(log)]]
    gathering.use(0, 1)
    gathering.release()
    assert [weights[0].ds_status for weights in gathering.weights] == [NOT_AVAILABLE, NOT_AVAILABLE]
    assert gathering.current is None
    assert gathering.under_way is None


def test_hooks_of_others_stay() -> None:
    layer, called = torch.nn.Linear(2, 2), []

    def own(*_: Any) -> None:
        called.append("own")

    def deepspeeds(*_: Any) -> None:
        called.append("deepspeed")

    deepspeeds.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for hook in (own, deepspeeds):
        layer.register_forward_pre_hook(hook)
        layer.register_forward_hook(hook)
    rollout: Any = torch.nn.Module()
    rollout.layers, rollout.grouped_layers = torch.nn.ModuleList([layer]), lambda: [torch.nn.ModuleList([layer])]
    gather_groups(rollout)
    layer(torch.zeros(1, 2))
    assert called == ["own", "own"]
