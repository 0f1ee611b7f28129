"""One rank of test_plan_memory.py: trains a small model with the real engine and measures the memory of its tensors.

Independent of the formulas in mirage_ds/sizing/memory.py. It measures the engine's own tensors, the weights and
gradients that are complete at the hooks of each module, and what the allocator still holds after forward.
"""

import gc
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from random_samples import END, PAD, START, random_sample
from row_shapes import shape_of
from torch.profiler import ProfilerActivity, profile

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model import losses
from mirage_ds.model.backbone import DTYPES, load_backbone
from mirage_ds.model.trained import choose_trained
from mirage_ds.train import make_model
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import initialize, mark_gather_units, parameter_groups

LATENT_SIZES, LATENT_IDS = (2, 6), [PAD, START, END]


def micro_batch(config: Config) -> Batch:
    """Rows of one size, the same at every call."""
    samples = [one_row(config)] * config.train.micro_batch_size
    return collate(samples, align_latents=config.train.stage == "stage2")


def one_row(config: Config) -> EncodedSample:
    """With two latent blocks of different K."""
    return random_sample(7, stage=config.train.stage, latent_size=LATENT_SIZES, images=2)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Watch:
    """Peak of the complete tensors, measured before and after each module, and before its backward."""

    def __init__(self, model: torch.nn.Module, bucket: torch.Tensor) -> None:
        self.parameters, self.bucket = list(model.parameters()), bucket
        self.gathered = self.full_gradients = self.logits = self.deferred = 0
        self.deferring = [each for layer in model.rollout.deferred for each in layer]
        for module in model.modules():
            module.register_forward_pre_hook(self.look)
            module.register_forward_hook(self.look)
            module.register_full_backward_pre_hook(self.look)

    def gathered_bytes(self) -> int:
        """Copies of those that are there, and the buffer for those that are under way; one rank has neither."""
        available = [p for p in self.parameters if p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist]
        there = [p.data for p in available if p.data.data_ptr() != p.ds_tensor.data_ptr()]  # one rank's own shards
        coming = [
            p for p in self.parameters if p.ds_status == ZeroParamStatus.INFLIGHT and p.ds_tensor.numel() < p.ds_numel
        ]
        return bytes_of(there) + sum(p.ds_numel * p.element_size() for p in coming)

    def look(self, *_: object) -> None:
        place = self.bucket.untyped_storage().data_ptr()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        waiting = [grad for grad in gradients if grad.untyped_storage().data_ptr() != place]
        self.gathered = max(self.gathered, self.gathered_bytes())
        self.full_gradients = max(self.full_gradients, bytes_of(waiting))
        self.deferred = max(
            self.deferred, bytes_of(each for gradient in self.deferring for pair in gradient.columns for each in pair)
        )

    def cross_entropy(self, logits: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """Replaces the function of losses.py; records the size of the logits and of their gradient."""
        self.logits = max(self.logits, logits.nbytes)
        if logits.requires_grad:
            logits.register_hook(self.see_gradient)
        return self.original(logits, *arguments, **settings)

    original = staticmethod(losses.chunked_cross_entropy)

    def see_gradient(self, gradient: torch.Tensor) -> None:
        self.logits = max(self.logits, 2 * gradient.nbytes)


def held_after(profiler: Any) -> dict[int, int]:
    """Bytes by address that were allocated inside the profile and not freed."""
    events = []

    def walk(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if node.tag.name == "Allocation":
                fields = node.extra_fields
                events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
            walk(node.children)

    walk(profiler.profiler.kineto_results.experimental_event_tree())
    held: dict[int, int] = {}
    for _, place, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            held[place] = size
        else:
            held.pop(place, None)
    return held


def run(config: Config) -> dict[str, Any]:
    """Two steps: in the first, DeepSpeed records the order of modules; the second is measured."""
    deepspeed_config = resolve_deepspeed_config(config)
    backbone = load_backbone(config.model.path, dtype=DTYPES[config.train.dtype], deepspeed_config=deepspeed_config)
    choose_trained(backbone, config.model, LATENT_IDS, config.run.seed)
    model = make_model(config, backbone)
    mark_gather_units(model, config)
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    zero = engine.optimizer
    (bucket,) = zero.ipg_buckets.values()

    def step() -> None:
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(batch=micro_batch(config)).loss, scale_wrt_gas=False)
        engine.step()

    step()
    watch = Watch(model, bucket.buffer)
    with mock.patch.object(losses, "chunked_cross_entropy", watch.cross_entropy):
        step()
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    report = {
        "row": asdict(shape_of(one_row(config), config.train.stage).row()),
        "parameters": bytes_of(p.ds_tensor for p in model.parameters())
        + bytes_of(p.data for p in model.parameters() if p.ds_persist),
        "optimizer": bytes_of(zero.fp32_partitioned_groups_flat)
        + bytes_of(value for value in states if isinstance(value, torch.Tensor)),
        "gradients": bytes_of([zero.grad_partitions_flat_buffer, bucket.buffer]),
        "gathered": watch.gathered,
        "full_gradients": watch.full_gradients,
        "deferred": watch.deferred,
        "logits": watch.logits,
    }
    host = {"host": host_bytes(model, zero)} if zero.offload_optimizer else {}
    engine.destroy()
    return report | host | {"kept": kept(config)}


def host_bytes(model: torch.nn.Module, zero: Any) -> int:
    """Bytes of what the engine keeps on the host: parameters, masters, moments, and two kinds of gradients."""
    masters = zero.fp32_partitioned_groups_flat
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    return bytes_of(
        [
            *(p.ds_tensor for p in model.parameters() if zero.offload_param),
            *masters,
            *(master.grad for master in masters),
            *(value for value in states if isinstance(value, torch.Tensor)),
            zero.grad_partitions_flat_buffer,
        ]
    )


def kept(config: Config) -> int:
    """What forward of the same model stores for backward; without an engine, which would add gathered weights."""
    backbone = load_backbone(config.model.path, dtype=DTYPES[config.train.dtype])
    choose_trained(backbone, config.model, LATENT_IDS, config.run.seed)
    model = make_model(config, backbone)
    batch = micro_batch(config)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = model(batch)
        gc.collect()
    held = held_after(profiler).values()
    assert outputs.loss.requires_grad
    return sum(held)


def main(cases: dict[str, Config], folder: Path) -> None:
    distributed.init(timeout_s=300)
    for name, config in cases.items():
        # The update of offloaded states is an op that DeepSpeed would compile for a minute; it allocates nothing.
        with mock.patch.object(CPUAdamBuilder, "load", mock.MagicMock()):
            report = run(config)
        if distributed.is_main():
            (folder / f"{name}.json").write_text(json.dumps(report))
    distributed.shut_down()
