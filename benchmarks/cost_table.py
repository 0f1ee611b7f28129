"""mirage_ds against the reference's step, restated (`reference_step.py`), and against the floor.

The model has hidden size 512, 8 decoder layers, 8 query and 2 key-value heads, MLPs of 1408; the tower has hidden size
320 and 8 blocks, in Qwen2.5-VL's proportions: 4 heads of 80, MLPs of 856 (2.67 x 320, as a multiple of 8), windows of
112 x 112 pixels, attention over the complete image in one block of eight, the last. A row has an image of 504 x 504
pixels (1296 patches, 324 merged), 502 tokens, 60 of them supervised, and 4 latents; in stage 1 a helper image of the
same size. Everything is in float32.

The floor is the time that the FLOPs of the mathematics (mirage_ds/sizing/flops.py: matrix products and attention of
forward and backward, causal attention counted once for each pair, nothing recomputed) take at the rate of a matrix
product, measured in the same run: the best of PRODUCTS.

Before anything is timed, loss and gradients of both are compared. Then all ways take turns, round by round, each with
one step to warm up. A row's seconds are the median over the rounds, divided by the rows of the micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from measuring import Measured, Step, measure, product_rates
from reference_step import on_device, reference_loss
from train_shapes import RowShape, Widths, make_batch, make_config, make_hf, make_model, make_row, text_section, tiny

from mirage_ds.config import Stage
from mirage_ds.data.encode import EncodedSample
from mirage_ds.sizing.flops import batch_load, work_of
from mirage_ds.sizing.model_sizes import count

VISION = {
    "depth": 8,
    "hidden_size": 320,
    "num_heads": 4,
    "intermediate_size": 856,
    "fullatt_block_indexes": [7],
    "window_size": 112,
    "out_hidden_size": 512,
}
SHAPE = RowShape(grid=(18, 18), tokens=502, targets=60, latent_size=4)
SMALL_SHAPE = RowShape(grid=(5, 6), tokens=48, targets=9, latent_size=4)
PRODUCTS = [(502, 512, 1408), (502, 1408, 512), (1024, 1024, 1024), (2048, 2048, 2048)]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative; of a gradient, the norm of the difference, by parameter
HEAD = ("stage", "vocabulary", "way", "rows", "s per row", "range", "CPU s", "x reference", "of floor", "peak MB")


@dataclass(frozen=True)
class Way:
    """The reference, or ours with a number of rows and of what is stored."""

    name: str  # "reference", "stored", "recomputed"
    rows: int = 1


def ways(micro_batches: Sequence[int], recompute: Sequence[str]) -> list[Way]:
    """Ours and the reference, in turn."""
    ours = [Way(name, rows) for rows in micro_batches for name in recompute]
    return [ours[0], Way("reference"), *ours[1:]]


def run(
    stages: Sequence[Stage],
    vocabularies: Sequence[int],
    compared: Sequence[Way],
    rounds: int,
    device: torch.device,
    *,
    small: bool,
) -> list[dict[str, Any]]:
    """All groups; prints the table while it measures."""
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * 3 + " ---: |" * 7)
    results = []
    for stage in stages:
        for vocab in vocabularies:
            shape = SMALL_SHAPE if small else SHAPE
            widths = tiny(2, vocab) if small else Widths(text_section(vocab, 512, 1408, 8, 8, 2), VISION)
            group = measure_group(stage, widths, shape, compared, rounds, device)
            for result in group:
                print(line(result), flush=True)
            results += group
    rate, product = max((result["product_flops"], result["product"]) for result in results)
    print(f"\nBest matrix product: {product}, {rate / 1e9:.1f} GFLOP/s")
    return results


def measure_group(
    stage: Stage, widths: Widths, shape: RowShape, compared: Sequence[Way], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """All ways of one stage and vocabulary, with the same weights and rows."""
    hf = make_hf(widths, dtype=torch.float32, device=device)
    vocab, sizes = widths.text["vocab_size"], count(hf)
    rows = [on_device(make_row(seed, shape, vocab, stage), device) for seed in range(max(way.rows for way in compared))]
    check_equal(hf, stage, rows[0])
    losses = {way: way_loss(way, hf, stage, rows) for way in compared}
    measured: dict[Way, list[Measured]] = {way: [] for way in compared}
    rates: list[dict[str, float]] = []
    for _ in range(rounds):
        rates.append(product_rates(PRODUCTS, device))
        for way, loss in losses.items():
            step_of(hf, loss)()
            step = step_of(hf, loss)
            measured[way].append(measure(step, device))
    product_flops, product = max((median(each[name] for each in rates), name) for name in rates[0])
    config = make_config(stage, 1, shape.latent_size, "fp32", recompute=False)
    flops = work_of(sizes, config, batch_load(sizes, make_batch(rows[:1], stage, device))).model
    reference_s = median(each.seconds for each in measured[Way("reference")])
    results = []
    for way, steps in measured.items():
        row_s = median(each.seconds for each in steps) / way.rows
        results.append(
            {"stage": stage, "vocab": vocab, "way": way.name, "rows": way.rows, "row_s": row_s}
            | {"speedup": reference_s / row_s, "of_floor": flops / row_s / product_flops}
            | {"peak_bytes": max(each.peak_bytes for each in steps), "steps": [asdict(each) for each in steps]}
            | {"flops_per_row": flops, "product": product, "product_flops": product_flops}
        )
    return results


def way_loss(way: Way, hf: Any, stage: Stage, rows: Sequence[EncodedSample]) -> Callable[[], torch.Tensor]:
    """What computes the loss of the first rows."""
    latent_size = max(rows[0].latent_sizes, default=1)
    config = make_config(stage, way.rows, latent_size, "fp32", recompute=way.name == "recomputed")
    if way.name == "reference":
        return lambda: reference_loss(hf, rows[0], stage, config.train.text_weight)
    model = make_model(hf, "sdpa", config)
    batch = make_batch(rows[: way.rows], stage, rows[0].input_ids.device)
    return lambda: model(batch).loss


def step_of(hf: Any, loss: Callable[[], torch.Tensor]) -> Step:
    """Forward and backward, into gradients that do not exist yet."""
    hf.zero_grad(set_to_none=True)
    return lambda: loss().backward()


def check_equal(hf: Any, stage: Stage, row: EncodedSample) -> None:
    """Compares loss and gradients of one row.

    Raises:
        AssertionError: they differ by more than the tolerances.
    """
    (expected, theirs), *ours = (
        loss_and_gradients(hf, way_loss(Way(name), hf, stage, [row])) for name in ("reference", "stored", "recomputed")
    )
    for loss, gradients in ours:
        assert abs(loss - expected) <= LOSS_TOLERANCE * abs(expected), f"{stage}: loss {loss}, not {expected}"
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            error = float((gradient - theirs[name]).norm() / theirs[name].norm())
            assert error <= GRADIENT_TOLERANCE, f"{stage}: the gradient of {name} differs by {error:.1e}"


def loss_and_gradients(hf: Any, loss: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    hf.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.item(), {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}


def line(result: dict[str, Any]) -> str:
    seconds = [step["seconds"] / result["rows"] for step in result["steps"]]
    cpu_s = median(step["cpu_s"] for step in result["steps"]) / result["rows"]
    cells = [result["stage"], result["vocab"], result["way"], result["rows"], f"{result['row_s']:.3f}"]
    cells += [f"{min(seconds):.3f} - {max(seconds):.3f}", f"{cpu_s:.3f}", f"{result['speedup']:.2f}"]
    cells += [f"{result['of_floor']:.0%}", f"{result['peak_bytes'] / 1e6:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"
