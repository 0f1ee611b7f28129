"""The text loss with a DeepSpeed that has no cross-entropy of its own, against the one that has."""

import importlib.util

import deepspeed
import pytest
import torch

from mirage_ds.model import losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_older_deepspeeds_have_the_same_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.18.9")
    older = importlib.util.module_from_spec(importlib.util.find_spec("mirage_ds.model.losses"))
    older.__spec__.loader.exec_module(older)
    assert older.cross_entropy is not losses.cross_entropy
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, 300, generator=draw)).to(dtype)
    target_ids, weights = torch.randint(300, (50,), generator=draw), torch.rand(50, generator=draw)
    found = []
    for module in (older, losses):
        leaf = logits.clone().requires_grad_()
        loss = module.cross_entropy(leaf, target_ids, reduction="none")
        assert loss.dtype == torch.float32
        (loss * weights).sum().backward()
        found.append((loss, leaf.grad))
    torch.testing.assert_close(*(loss for loss, _ in found), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(grad for _, grad in found))
