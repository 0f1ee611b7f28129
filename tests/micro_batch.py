"""One micro-batch through a model: what several tests compare."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.mirage import MirageModel

aten = torch.ops.aten
# Reading a value or a number of entries from a GPU waits for all that it was told to do before.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero, aten.equal}


def losses_of(model: MirageModel, samples: list[EncodedSample], num_passes: int | None = None) -> tuple[float, float]:
    """Loss and gradient norm of one micro-batch."""
    model.zero_grad()
    losses = model(collate(samples, align_latents=model.stage == "stage2"), num_passes)
    losses.loss.backward()
    grads = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return losses.loss.item(), torch.stack(grads).norm().item()


def check_against(model: MirageModel, batches: list[Batch], plain: tuple[float, dict[str, torch.Tensor]]) -> None:
    """The micro-batches' losses, to 1e-5, and gradients, to 1e-4 of each one's norm, are those of the plain loop."""
    losses, gradients = plain
    total = 0.0
    for batch in batches:
        loss = model(batch).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(losses, rel=1e-5)
    found = {name: each.grad for name, each in model.hf.named_parameters() if each.grad is not None}
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of storages that were created inside it and are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def num_bytes(self, *known: torch.Tensor) -> int:
        skip = {tensor.untyped_storage()._cdata for tensor in known}
        return sum(size for key, (ref, size) in self.made.items() if key not in skip and not ref.expired())


def stored_bytes(model: MirageModel, samples: list[EncodedSample]) -> int:
    """Bytes that the forward pass of a micro-batch stores for backward."""
    batch = collate(samples, align_latents=model.stage == "stage2")
    with LiveStorage() as live:
        losses = model(batch)
    stored = live.num_bytes(*model.parameters(), batch.pixel_values, batch.pixel_levels)  # the batch is there anyway
    losses.loss.backward()
    return stored


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += func.overloadpacket in WAITS or by_mask
        return func(*args, **(kwargs or {}))
