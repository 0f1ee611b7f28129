"""A rollout divided into groups of layers, against the undivided one: weights are there only while a group is used, and
no more than one whole gradient of a layer's matrix waits at a time.

A stand-in for ZeRO-3 takes the weights away; tests/distributed/test_sharding.py has the real one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
import torch
from micro_batch import LiveStorage, losses_of
from random_samples import ragged_batch

from mirage_ds.data.collate import collate
from mirage_ds.model.layer_groups import visits

BLOCKS = [[2, 8, 2], [3], [], [4, 1]]


class Taken:
    """Has the weights of at most two groups; the others are empty. Notes what happens."""

    def __init__(self, groups: Sequence[torch.nn.ModuleList]) -> None:
        self.weights = [[(weight, weight.data) for weight in group.parameters()] for group in groups]
        self.there: set[int] = set()
        self.gathered: list[int] = []
        for group in range(len(groups)):
            self.take(group)

    def take(self, group: int) -> None:
        for weight, _ in self.weights[group]:
            weight.data = torch.empty(0)
        self.there.discard(group)

    def give(self, group: int) -> None:
        if group not in self.there:
            for weight, data in self.weights[group]:
                weight.data = data
            self.there.add(group)
            self.gathered.append(group)

    def use(self, group: int, following: int | None) -> None:
        for other in self.there - {group}:
            self.take(other)
        self.give(group)

    def release(self) -> None:
        for group in tuple(self.there):
            self.take(group)


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("group_layers", [1, 2, 3, 4])
def test_losses_and_gradients_are_those_of_the_undivided_rollout(
    make_model, group_layers: int, recompute: bool
) -> None:
    """Rows of 0 to 3 blocks; and with passes more than they need, as on a rank beside one with more blocks."""
    samples = ragged_batch(2, 4, stage="stage2", latent_sizes=BLOCKS)
    model, divided = (make_model("stage2", recompute=recompute) for _ in range(2))
    losses_of(model, samples)
    divided.rollout.divide(group_layers)
    taken = divided.rollout.gathering = Taken(divided.rollout.grouped_layers())
    needed = divided.rollout.num_passes(collate(samples, align_latents=True))
    num_groups = -(-len(divided.rollout.layers) // group_layers)
    for num_passes in (None, needed + 3):
        loss, _ = losses_of(divided, samples, num_passes)
        assert loss == pytest.approx(losses_of(model, samples)[0], rel=1e-5)
        assert not taken.there
        for (name, weight), (_, expected) in zip(
            divided.hf.named_parameters(), model.hf.named_parameters(), strict=True
        ):
            if expected.grad is not None:
                torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
        # Each in forward and in backward of each pass, but that the last one is still there when backward begins.
        uses = 2 * (num_passes or needed)
        expected_uses = Counter(dict.fromkeys(range(num_groups), uses)) - Counter([num_groups - 1])
        assert Counter(taken.gathered) == (expected_uses if num_groups > 1 else Counter([0]))
        taken.gathered.clear()


def test_without_gradients_nothing_stays(make_model) -> None:
    """As in a validation."""
    model = make_model("stage2")
    model.rollout.divide(1)
    taken = model.rollout.gathering = Taken(model.rollout.grouped_layers())
    with torch.no_grad():
        model(collate(ragged_batch(2, 2, stage="stage2", latent_sizes=[2, 3]), align_latents=True))
    assert taken.gathered
    assert not taken.there


def test_what_is_needed_next() -> None:
    """The groups before and after, in the order of the passes."""
    found = [[(use.group, use.next_forward, use.next_backward) for use in each] for each in visits(None, 2, 2)]
    assert found == [[(0, 1, None), (1, 0, 0)], [(0, 1, 1), (1, None, 0)]]


class WholeGradients(LiveStorage):
    """The most storages of one size that were there at once, besides the weights'."""

    def __init__(self, num_bytes: int, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.size, self.most = num_bytes, 0
        self.known = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(func, types, args, kwargs)
        made = ((ref, size) for key, (ref, size) in self.made.items() if key not in self.known)
        self.most = max(self.most, sum(size == self.size and not ref.expired() for ref, size in made))
        return output


@pytest.mark.parametrize("group_layers", [None, 1])
def test_whole_gradients_do_not_wait_for_the_first_pass(make_model, group_layers: int | None) -> None:
    """Backward comes to the first pass last, and autograd sums the gradients of all passes until then: of the undivided
    rollout those of all layers. Where a gradient is complete it is taken away at once, as ZeRO-3 does. Counted by the
    size of `down_proj`, which no activation has."""
    model = make_model("stage2")
    weights, num_bytes = (
        [weight.data for weight in model.rollout.parameters()],
        model.rollout.layers[0].mlp.down_proj.weight.nbytes,
    )
    if group_layers:
        model.rollout.divide(group_layers)
        model.rollout.gathering = Taken(model.rollout.grouped_layers())
    for weight in model.rollout.layers.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    batch = collate(ragged_batch(2, 2, stage="stage2", latent_sizes=[[2, 2], [3]]), align_latents=True)
    loss = model(batch).loss
    with WholeGradients(num_bytes, weights) as whole:
        loss.backward()
    # Gate and up have the same size. Divided: one gradient, and the sum that takes its place.
    assert (whole.most <= 2) if group_layers else (whole.most >= 3 * len(model.rollout.layers))
