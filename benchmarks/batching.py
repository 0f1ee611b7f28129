"""Real tokens per second of a training step, by how samples are put into micro-batches, on a CPU.

    python benchmarks/batching.py --json batching.json

Lengths are drawn as published rows have them, log-normal between 300 and 9000 tokens (half of them above 1200), and
divided by SCALE, so that a CPU computes them; the ratios stay. Two fifths of a row are its image, a fifth is its
answer, with 4 latents in it; in stage 1 a helper image of the same size. The decoder has the widths of
`cost_table.py`, 4 layers and a vocabulary of 4096; the tower is so small that a patch costs about 1/25 of a token, as
in the 3B and the 7B (mirage_ds/data/costs.py). In float32, nothing recomputed.

The ways, each over the same global batches of one rank:

in order    micro-batches of 4 samples as they come, padded to the longest
balanced    micro-batches of 4 samples that are alike (`data.balance`)
packed      rows of at most as many tokens as the longest sample may have, without padding (`data.packing`)

Before anything is timed, the losses of all ways are compared. A round is forward and backward of every global batch,
without optimizer and DeepSpeed, and the ways take turns. Tokens are those of the samples, padding is none; seconds are
the median over the rounds. Nothing else should run on the machine. `--small` only tests the script.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cost_table import LOSS_TOLERANCE
from measuring import Measured, environment, measure
from train_shapes import RowShape, Widths, make_config, make_hf, make_model, make_row, text_section, tiny

from mirage_ds.batch import Batch
from mirage_ds.config import Stage
from mirage_ds.data.collate import collate
from mirage_ds.data.costs import TOKEN_PATCHES
from mirage_ds.data.deal import deal, deal_in_order, deal_packed
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.packing import collate_packed
from mirage_ds.model.mirage import MirageModel

SHORTEST, MIDDLE, LONGEST = 300, 1200, 9000  # tokens
SIGMA = 0.8
SCALE, SMALL_SCALE = 12, 60
GLOBAL_BATCH, MICRO_BATCH, LATENT_SIZE, VOCAB = 32, 4, 4, 4096
VISION = {
    "depth": 4,
    "hidden_size": 160,
    "num_heads": 2,
    "intermediate_size": 428,
    "fullatt_block_indexes": [3],
    "window_size": 112,
    "out_hidden_size": 512,
}
WAYS: dict[Stage, tuple[str, ...]] = {
    "stage1": ("in order", "balanced", "packed"),
    "stage2": ("in order", "balanced"),
}
HEAD = ("stage", "way", "micro-batches", "padding", "tokens/s", "range", "x in order")
CPU = torch.device("cpu")


def draw_lengths(count: int, scale: int) -> list[int]:
    """Tokens of the samples, scaled."""
    draw = random.Random(0)
    lengths = (min(LONGEST, max(SHORTEST, draw.lognormvariate(np.log(MIDDLE), SIGMA))) for _ in range(count))
    return [max(LATENT_SIZE + 12, round(length / scale)) for length in lengths]


def shape_of(tokens: int) -> RowShape:
    """A square image of two fifths of the tokens, an answer of a fifth."""
    side = max(2, int((0.4 * tokens) ** 0.5))
    return RowShape((side, side), tokens, max(3, tokens // 5), LATENT_SIZE)


def micro_batches(way: str, stage: Stage, samples: Sequence[EncodedSample], budget: int) -> list[Batch]:
    """The micro-batches of one global batch on one rank."""
    tokens = np.array([len(sample.input_ids) for sample in samples])
    patches = np.array([len(sample.pixel_values) + len(sample.pixel_values_latent) for sample in samples])
    costs = TOKEN_PATCHES * tokens + patches
    if way == "packed":
        dealt = deal_packed(tokens, costs, 1, budget)
        return [collate_packed([samples[place] for place in places]) for (places,) in dealt]
    dealt = deal(costs, 1, MICRO_BATCH) if way == "balanced" else deal_in_order(len(tokens), 1, MICRO_BATCH)
    return [collate([samples[place] for place in places], align_latents=stage == "stage2") for (places,) in dealt]


def run(stage: Stage, rounds: int, num_samples: int, *, small: bool) -> list[dict[str, Any]]:
    """All ways of one stage, with the same weights and samples."""
    scale = SMALL_SCALE if small else SCALE
    widths = tiny(2, 320) if small else Widths(text_section(VOCAB, 512, 1408, 4, 8, 2), VISION)
    vocab = widths.text["vocab_size"]
    model = make_model(
        make_hf(widths, dtype=torch.float32, device=CPU),
        "sdpa",
        make_config(stage, MICRO_BATCH, LATENT_SIZE, "fp32", recompute=False),
    )
    lengths = draw_lengths(num_samples, scale)
    samples = [make_row(seed, shape_of(length), vocab, stage) for seed, length in enumerate(lengths)]
    parts = [samples[start : start + GLOBAL_BATCH] for start in range(0, num_samples, GLOBAL_BATCH)]
    batches = {
        way: [batch for part in parts for batch in micro_batches(way, stage, part, LONGEST // scale)]
        for way in WAYS[stage]
    }
    check_equal({way: loss_of(model, each) for way, each in batches.items()})
    measured: dict[str, list[Measured]] = {way: [] for way in batches}
    for _ in range(rounds):
        for way, own in batches.items():
            measured[way].append(measure(step_of(model, own), CPU))
    return results_of(stage, sum(lengths), batches, measured)


def step_of(model: MirageModel, batches: Sequence[Batch]) -> Callable[[], None]:
    """Forward and backward of all micro-batches."""
    model.zero_grad(set_to_none=True)

    def step() -> None:
        for batch in batches:
            model(batch).loss.backward()

    return step


def loss_of(model: MirageModel, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        return sum(model(batch).loss.item() for batch in batches)


def check_equal(losses: dict[str, float]) -> None:
    """All ways compute the same.

    Raises:
        AssertionError: a loss differs from that of the first way.
    """
    expected = losses["in order"]
    for way, loss in losses.items():
        assert abs(loss - expected) <= LOSS_TOLERANCE * abs(expected), f"{way}: loss {loss}, not {expected}"


def results_of(
    stage: Stage, tokens: int, batches: dict[str, list[Batch]], measured: dict[str, list[Measured]]
) -> list[dict[str, Any]]:
    seconds = {way: median(step.seconds for step in steps) for way, steps in measured.items()}
    return [
        {
            "stage": stage,
            "way": way,
            "micro_batches": len(batches[way]),
            "padding": 1 - tokens / sum(batch.input_ids.numel() for batch in batches[way]),
            "tokens": tokens,
            "tokens_per_s": tokens / seconds[way],
            "speedup": seconds["in order"] / seconds[way],
            "steps": [asdict(step) for step in steps],
        }
        for way, steps in measured.items()
    ]


def line(result: dict[str, Any]) -> str:
    rates = [result["tokens"] / step["seconds"] for step in result["steps"]]
    cells = [result["stage"], result["way"], result["micro_batches"], f"{result['padding']:.0%}"]
    cells += [f"{result['tokens_per_s']:.0f}", f"{min(rates):.0f} - {max(rates):.0f}", f"{result['speedup']:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="measured rounds; default: 5")
    parser.add_argument("--samples", type=int, default=2 * GLOBAL_BATCH, help=f"a multiple of {GLOBAL_BATCH}")
    parser.add_argument("--threads", type=int, default=2, help="of torch; default: 2")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = environment(CPU)
    print(json.dumps(facts))
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * 2 + " ---: |" * 5)
    results = []
    for stage in WAYS:
        found = run(stage, arguments.runs, arguments.samples, small=arguments.small)
        print("\n".join(map(line, found)), flush=True)
        results += found
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
