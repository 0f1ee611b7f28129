"""One rank of test_plan.py: trains a small model through the real engine and measures what its tensors take.

    deepspeed --num_accelerators 2 tests/distributed/memory_worker.py CASES.json FOLDER

Nothing here knows the formulas of launch/memory.py: sizes are those of the engine's own tensors, of the tensors that
autograd keeps, and of the weights and gradients that are whole at each module's hooks.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from random_samples import random_sample

from mirage_ds import distributed
from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.deepspeed_config import resolve_deepspeed_config
from mirage_ds.engine import choose_gather, initialize, mark_gather_units, parameter_groups
from mirage_ds.model import losses
from mirage_ds.model.backbone import DTYPES, load_backbone
from mirage_ds.train import make_model


def micro_batch(config: Config) -> Batch:
    """Random rows of one size, the same at every call."""
    size = config.train.micro_batch_size_per_gpu
    samples = [random_sample(7, stage=config.train.stage, latent_size=config.model.latent_size) for _ in range(size)]
    return collate(samples, align_latents=config.train.stage == "stage2")


def unique_bytes(tensors: Any) -> int:
    """Bytes of the storages of some tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Watch:
    """The most that was alive at once in a step, by kind."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.peaks = {"gathered": 0, "whole_gradients": 0, "logits": 0}
        self.saved: dict[int, int] = {}
        for module in model.modules():
            module.register_forward_pre_hook(self.look)
            module.register_forward_hook(self.look)
            module.register_full_backward_pre_hook(self.look)
        head = model.rollout.head
        inner = head._block_loss

        def block_loss(*arguments: torch.Tensor) -> torch.Tensor:
            before = self.allocated()
            loss = inner(*arguments)
            return loss

    def look(self, *_: object) -> None:
        whole = [p for p in self.parameters if p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist]
        self.note("gathered", unique_bytes(p.data for p in whole))
        self.note("whole_gradients", unique_bytes(p.grad for p in self.parameters if p.grad is not None))

    def note(self, kind: str, size: int) -> None:
        self.peaks[kind] = max(self.peaks[kind], size)

    @contextmanager
    def saving(self) -> Iterator[None]:
        weights = {p.data_ptr() for p in self.parameters}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            mine = {p.untyped_storage().data_ptr() for p in self.parameters if p.ds_status == ZeroParamStatus.AVAILABLE}
            if storage.data_ptr() not in mine:
                self.saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def run(name: str, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    config = Config.model_validate(settings)
    deepspeed_config = resolve_deepspeed_config(config)
    backbone = load_backbone(
        config.model.path, dtype=DTYPES[config.train.dtype], deepspeed_config=deepspeed_config
    )
    model = make_model(config, backbone)
    mark_gather_units(model, choose_gather(config.model, config.train.stage))
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    batch = micro_batch(config)
    passes = len(batch.latent_columns) + 1 if config.train.stage == "stage2" else None

    def forward_backward(micro_step: int) -> None:
        engine.set_gradient_accumulation_boundary(True)
        losses_ = engine(batch=micro_batch(config), num_passes=passes)
        engine.backward(losses_.loss, scale_wrt_gas=False)
        engine.step()

    for _ in range(2):  # the first step records the order of modules, the second one follows it
        forward_backward(0)
    watch = Watch(model)
    engine.set_gradient_accumulation_boundary(True)
    with watch.saving():
        out = engine(batch=micro_batch(config), num_passes=passes)
    engine.backward(out.loss, scale_wrt_gas=False)
    engine.step()
    del out
    gc.collect()
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        engine.set_gradient_accumulation_boundary(True)
        losses_ = engine(batch=micro_batch(config), num_passes=passes)
        engine.backward(losses_.loss, scale_wrt_gas=False)
    engine.step()
    events = []
    def walk(nodes):
        for n in nodes:
            if n.tag.name == "Allocation":
                events.append((n.start_time_ns, n.extra_fields.ptr, n.extra_fields.alloc_size))
            walk(n.children)
    walk(prof.profiler.kineto_results.experimental_event_tree())
    events.sort(key=lambda e: e[0])
    live, peak, held = 0, 0, {}
    best = {}
    for i, (_, ptr, size) in enumerate(events):
        if size > 0:
            held[ptr] = size; live += size
            if live > peak: peak = live; best = dict(held); at = i
        elif ptr in held:
            live += size; held.pop(ptr)
    import collections
    if distributed.is_main():
        for i, (_, ptr, size) in enumerate(events):
            if abs(size) > 300000: print(name, "BIG", i, len(events), hex(ptr)[-6:], size, flush=True)
    print(name, "EVENTS", len(events), "peak at", at, sorted(collections.Counter(best.values()).items(), key=lambda kv: -kv[0]*kv[1])[:12])
    zero = engine.optimizer
    state = [v for s in zero.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    report = {
        "tokens": list(batch.input_ids.shape), "targets": len(batch.target_rows), "patches": len(batch.pixel_values), "passes": passes,
        "parameters": unique_bytes(p.ds_tensor for p in model.parameters()),
        "persistent": unique_bytes(p.data for p in model.parameters() if p.ds_persist),
        "masters": unique_bytes(zero.fp32_partitioned_groups_flat),
        "shared": unique_bytes(p.ds_tensor for p in model.parameters()) + unique_bytes(zero.fp32_partitioned_groups_flat) - unique_bytes([*[p.ds_tensor for p in model.parameters()], *zero.fp32_partitioned_groups_flat]),
        "moments": unique_bytes(state),
        "gradients": zero.grad_partitions_flat_buffer.untyped_storage().nbytes(),
        "bucket": unique_bytes(b.buffer for b in zero.ipg_buckets.values()),
        "saved": sum(watch.saved.values()),
        "profiled_peak": peak,
        **watch.peaks,
    }
    engine.destroy()
    return report


def main() -> None:
    cases, folder = Path(sys.argv[-2]), Path(sys.argv[-1])
    device = distributed.init(timeout_s=300)
    for name, settings in json.loads(cases.read_text()).items():
        report = run(name, settings, device)
        if distributed.is_main():
            print(name, json.dumps(report), flush=True)
            (folder / f"{name}.json").write_text(json.dumps(report))
    distributed.shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
