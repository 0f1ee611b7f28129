"""Gradients that passes of one column leave for later: none is lost, added twice, or left over.

That they are right at all is shown against the plain loop in test_rollout.py and test_blocks.py.
"""

import pytest
import torch
from micro_batch import losses_of
from random_samples import ragged_batch

from mirage_ds.data.collate import collate
from mirage_ds.model.weight_gradients import deferred_gradients, deferring

SAMPLES = ragged_batch(1, 2, stage="stage2", latent_sizes=[4, 4])


def test_the_factors_give_the_gradients_of_the_plain_module() -> None:
    """Weight and bias, over two columns and a pass that is not deferred, added up over two backwards."""
    module = torch.nn.Linear(5, 3)
    inputs = torch.randn(3, 2, 1, 5)

    def losses(gradients: list) -> list[torch.Tensor]:
        found = []
        for _ in range(2):
            first = module(inputs[0])
            with deferring(gradients):
                found.append((first * (module(inputs[1]) + module(inputs[2])).tanh()).sum())
        return found

    def gradients_of(gradients: list) -> list[torch.Tensor]:
        module.zero_grad()
        for loss in losses(gradients):
            loss.backward()
        return [module.weight.grad.clone(), module.bias.grad.clone()]

    torch.testing.assert_close(gradients_of(deferred_gradients(module)), gradients_of([]))


def test_frozen_weights_are_left_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    module[0].requires_grad_(False)
    assert [each.module for each in deferred_gradients(module)] == [module[1]]


def test_an_interrupted_backward_leaves_nothing(make_model) -> None:
    """As one that ran out of memory: what its passes left must not be added to the next gradient."""
    model = make_model("stage2")
    expected = losses_of(model, SAMPLES)

    def interrupt(_: torch.Tensor) -> None:
        raise MemoryError

    # The last layer's gradients come first: those of the others are waiting.
    handle = model.rollout.layers[-1].mlp.down_proj.weight.register_hook(interrupt)
    with pytest.raises(MemoryError):
        losses_of(model, SAMPLES)
    handle.remove()
    assert any(each.columns for layer in model.rollout.deferred for each in layer)
    assert losses_of(model, SAMPLES) == pytest.approx(expected, rel=1e-6)


def test_a_replaced_weight_is_an_error(make_model) -> None:
    """Its gradient would lack the passes over one column."""
    model = make_model("stage2")
    module = model.rollout.layers[0].mlp.down_proj
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with pytest.raises(RuntimeError, match="was replaced"):
        model(collate(SAMPLES, align_latents=True))
