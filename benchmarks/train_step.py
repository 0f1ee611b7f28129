"""Times a training step: forward and backward of one micro-batch in one process, without optimizer and DeepSpeed.

    python benchmarks/train_step.py --json cost.json            # on a CPU: against the reference's step and the floor
    python benchmarks/train_step.py --device cuda --json 7b.json    # on a GPU: 7B widths

What is computed and compared, and how the numbers are made: `cost_table.py` and `seven_b.py` beside this file, which
`--cases` chooses between. Both print one table and write JSON with every measured step, the machine, the versions and
the commit. On a CPU nothing else should run. `--small` only tests the scripts; its times mean nothing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import cost_table
import seven_b
import torch
from measuring import environment

from mirage_ds.config import Stage

CASES = {"cpu": "cost-table", "cuda": "seven-b"}
STAGES, ACTIVATIONS = get_args(Stage), ("stored", "recomputed")
SMALL_VOCAB = 320


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--cases", choices=tuple(CASES.values()), help="default: cost-table on a CPU, seven-b on a GPU")
    parser.add_argument("--only", type=one_or_more(STAGES), help=f"{','.join(STAGES)}; default: those of the cases")
    parser.add_argument("--micro-batch", type=numbers, default=(1, 8), help="rows; default: 1,8")
    parser.add_argument("--runs", type=int, default=5, help="measured steps of each case; default: 5")
    parser.add_argument("--vocab", type=numbers, default=(32000, 151936), help="cost-table; default: 32000,151936")
    parser.add_argument(
        "--activations", type=one_or_more(ACTIVATIONS), default=ACTIVATIONS, help=f"cost-table: {','.join(ACTIVATIONS)}"
    )
    parser.add_argument("--cudnn", action="store_true", help="seven-b: with cuDNN's sdpa, which the trainer avoids")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU; default: 2")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--small", action="store_true", help="tiny models, to test the scripts")
    return parser, parser.parse_args()


def one_or_more(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Reads names between commas."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(allowed)}, one or more with commas")
        return found

    return read


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser, arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; --device cpu --cases seven-b --small only tests the script")
    torch.set_num_threads(arguments.threads)
    cases = arguments.cases or CASES[device.type]
    stages = arguments.only or (STAGES if cases == "seven-b" else ("stage1", "stage2"))
    facts = environment(device)
    print(json.dumps(facts))
    if cases == "seven-b":
        results = seven_b.run(
            stages, arguments.micro_batch, arguments.runs, device, small=arguments.small, cudnn=arguments.cudnn
        )
    else:
        compared = cost_table.ways(arguments.micro_batch, arguments.activations)
        vocabularies = (SMALL_VOCAB,) if arguments.small else arguments.vocab
        results = cost_table.run(stages, vocabularies, compared, arguments.runs, device, small=arguments.small)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
