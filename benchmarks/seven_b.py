"""A training step of 7B widths on one GPU, with 4 and 8 of the 28 decoder layers; the slope gives the full depth.

Cases: text, stage 1, stage 2 with K = 2, 4 and 8; sdpa and, where it is installed, flash_attention_2; recomputed or
stored; micro-batch 1 and 8; rows of one shape, or of another shape in every step. Everything is in bf16; the tower is
complete. One process without DeepSpeed: gathering of weights (`model.gather`) and the optimizer are not in a step.

For each case: milliseconds of a step at both depths and, from their slope, at 28 layers; FLOP/s of the mathematics at
the larger depth; how often the host waits for the GPU in a step; memory above weights and gradients, measured and by
the formulas of mirage_ds/sizing/memory.py. Gradients exist before a step and accumulate. Then the losses of every stage
against those in float32.
"""

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, repeat
from statistics import median
from typing import Any

import torch
from measuring import Measured, Step, host_syncs, measure, present_bytes
from train_shapes import RowShape, make_batch, make_config, make_hf, make_model, make_row, seven_b, tiny, varied
from transformers.utils import is_flash_attn_2_available

from mirage_ds.batch import Batch
from mirage_ds.config import Config, Stage
from mirage_ds.model.mirage import MirageModel
from mirage_ds.sizing.flops import batch_load, work_of
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.model_sizes import ModelSizes, count
from mirage_ds.sizing.workload import Shape
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

LAYERS, FULL_DEPTH = (4, 8), 28
SHAPE = RowShape(grid=(18, 18), tokens=512, targets=60, latent_size=8)
SMALL_SHAPE = RowShape(grid=(5, 6), tokens=60, targets=9, latent_size=8)
SMALL_LAYERS, SMALL_VOCAB = (1, 2), 320
STAGES: tuple[tuple[Stage, int], ...] = (("text", 0), ("stage1", 4), ("stage2", 2), ("stage2", 4), ("stage2", 8))
WARM_UP = 2  # steps
HEAD = ("attention", "stage", "K", "activations", "lengths", "rows", "ms", "at 28 layers", "TFLOP/s", "syncs", "GiB")


@dataclass(frozen=True)
class Case:
    attention: str
    stage: Stage
    latent_size: int
    recompute: bool
    varying: bool
    rows: int

    @property
    def config(self) -> Config:
        return make_config(self.stage, self.rows, max(1, self.latent_size), "bf16", recompute=self.recompute)


def attentions(device: torch.device) -> tuple[str, ...]:
    return ("sdpa", "flash_attention_2") if device.type == "cuda" and is_flash_attn_2_available() else ("sdpa",)


def cases(device: torch.device, stages: Sequence[Stage], micro_batches: Sequence[int]) -> list[Case]:
    kinds = [(stage, k) for stage, k in STAGES if stage in stages]
    everything = product(attentions(device), kinds, (True, False), (False, True), micro_batches)
    return [Case(attention, *kind, *others) for attention, kind, *others in everything]


def run(
    stages: Sequence[Stage], micro_batches: Sequence[int], steps: int, device: torch.device, *, small: bool, cudnn: bool
) -> dict[str, Any]:
    """All cases at both depths, and the losses; prints the tables.

    Args:
        cudnn: let torch choose cuDNN's sdpa, which the trainer never does.
    """
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    shape = SMALL_SHAPE if small else SHAPE
    depths = SMALL_LAYERS if small else LAYERS
    listed = cases(device, stages, micro_batches)
    results: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for layers in depths:
        widths = tiny(layers, SMALL_VOCAB) if small else seven_b(layers)
        hf = make_hf(widths, dtype=torch.bfloat16, device=device)
        if layers == depths[0]:
            losses = compare_losses(hf, stages, shape, device)
        results += [{"layers": layers} | measure_case(hf, case, shape, steps, device) for case in listed]
        del hf
        gc.collect()
    print_steps(results, depths)
    print_losses(losses)
    return {"steps": results, "losses": losses}


def measure_case(hf: Any, case: Case, shape: RowShape, steps: int, device: torch.device) -> dict[str, Any]:
    """Warm-up, measured steps, and one more that counts synchronisations."""
    sizes, model = count(hf), make_model(hf, case.attention, case.config)
    batches = make_batches(case, shape, sizes.vocab, device)
    for _ in range(WARM_UP):
        step_of(model, next(batches))()
    measured: list[Measured] = []
    flops, above, planned = [], [], []
    for _ in range(steps):
        batch = next(batches)
        resident = present_bytes(device)
        measured.append(measure(step_of(model, batch), device))
        above.append(measured[-1].peak_bytes - resident)
        planned.append(planned_bytes(sizes, case.config, batch))
        flops.append(work_of(sizes, case.config, batch_load(sizes, batch)).model)
    largest = max(range(steps), key=above.__getitem__)
    return asdict(case) | {
        "ms": 1000 * median(each.seconds for each in measured),
        "flops_per_s": median(work / each.seconds for work, each in zip(flops, measured, strict=True)),
        "syncs": host_syncs(step_of(model, next(batches)), device),
        "above_resident_bytes": above[largest],
        "planned_bytes": planned[largest],
        "seconds": [each.seconds for each in measured],
    }


def make_batches(case: Case, shape: RowShape, vocab: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches without end: the same one, or each with rows of other shapes."""
    largest = replace(shape, latent_size=max(1, case.latent_size))
    shapes = varied(largest) if case.varying else repeat(largest)
    while True:
        rows = [make_row(seed, next(shapes), vocab, case.stage) for seed in range(case.rows)]
        batch = make_batch(rows, case.stage, device)
        yield batch
        while not case.varying:
            yield batch


def step_of(model: MirageModel, batch: Batch) -> Step:
    return lambda: model(batch).loss.backward()


def planned_bytes(sizes: ModelSizes, config: Config, batch: Batch) -> int:
    """Memory of a step above weights and gradients: what forward stores, logits, gradients before they are added."""
    rows, columns = batch.input_ids.shape
    latents = len(batch.latent_columns) if config.train.stage == "stage2" else 0
    lead = batch.latent_columns[0] if latents else columns
    row = Shape(
        stretches=(lead, columns - lead - latents) if latents else (lead,),
        latent_sizes=(latents,) if latents else (),
        targets=len(batch.target_rows) // rows,
        patches=len(batch.pixel_values) // rows,
    ).row()
    memory = estimate_memory(sizes, config, resolve_deepspeed_config(config), row, world_size=1)
    return memory.activations + memory.logits + memory.full_gradients


def compare_losses(hf: Any, stages: Sequence[Stage], shape: RowShape, device: torch.device) -> list[dict[str, Any]]:
    """Losses of one row in bf16, by attention, and with the same weights in float32 by sdpa."""
    exact = copy.deepcopy(hf).float()
    compared = []
    for stage, latent_size in STAGES:
        if stage not in stages:
            continue
        case = Case("sdpa", stage, latent_size, recompute=False, varying=False, rows=1)
        batch = next(make_batches(case, shape, hf.config.text_config.vocab_size, device))
        with torch.no_grad():
            losses = {"float32": make_model(exact, "sdpa", case.config)(batch).loss.item()}
            losses |= {way: make_model(hf, way, case.config)(batch).loss.item() for way in attentions(device)}
        compared.append({"stage": stage, "latent_size": latent_size} | losses)
    return compared


def print_steps(results: Sequence[dict[str, Any]], depths: tuple[int, int]) -> None:
    """One line for each case, of both depths."""
    low, high = depths
    print(f"Depths: {low} and {high} layers; rate, syncs and memory (measured / planned) of {high}.\n")
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * 5 + " ---: |" * 6)
    half = len(results) // 2
    for shallow, deep in zip(results[:half], results[half:], strict=True):
        full = deep["ms"] + (FULL_DEPTH - high) * (deep["ms"] - shallow["ms"]) / (high - low)
        gib = " / ".join(f"{deep[name] / 2**30:.2f}" for name in ("above_resident_bytes", "planned_bytes"))
        cells = [deep["attention"], deep["stage"], deep["latent_size"], "recomputed" if deep["recompute"] else "stored"]
        cells += ["varying" if deep["varying"] else "fixed", deep["rows"]]
        cells += [f"{shallow['ms']:.1f} / {deep['ms']:.1f}", f"{full:.0f}", f"{deep['flops_per_s'] / 1e12:.1f}"]
        print("| " + " | ".join(map(str, [*cells, deep["syncs"], gib])) + " |")


def print_losses(losses: Sequence[dict[str, Any]]) -> None:
    """A line for each stage and K."""
    print("\n| " + " | ".join(losses[0]) + " |\n|" + " --- |" * len(losses[0]))
    for each in losses:
        print("| " + " | ".join(f"{v:.6f}" if isinstance(v, float) else str(v) for v in each.values()) + " |")
