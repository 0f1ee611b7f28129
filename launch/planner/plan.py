"""`mirage-launch plan RECIPE --nodes N --gpus-per-node G --gpu h100-80gb`: estimates memory, time and traffic of a run.

--nodes may be repeated for a table of several columns: --nodes 1 --nodes 2 --nodes 4. The memory formulas are compared
with a small run by tests/distributed/test_plan_memory.py; times have never been checked on a GPU.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mirage_ds.config import Config
from mirage_ds.evaluation.training.named import check_scoring
from mirage_ds.paths import expanded, is_url, without_secrets
from mirage_ds.recipe import load_config
from mirage_ds.sizing.gpus import COMPUTE_EFFICIENCY, GPUS, LINK_EFFICIENCY, MEMORY_EFFICIENCY, USABLE, find_gpu
from mirage_ds.wide_console import wide_console

if TYPE_CHECKING:
    from launch.planner.estimate import Estimate

GIB = 2**30
GB = 10**9


@expanded()
def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, for example one of launch/recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
    *,
    nodes: Annotated[list[int], typer.Option(min=1, help="Number of nodes; repeat for several columns.")],
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node; one rank each.")],
    gpu: Annotated[str, typer.Option(help=f"GPU type: {', '.join(GPUS)}.")],
    mem: Annotated[
        float | None, typer.Option(min=0, help="GiB of host memory of a node: a run that needs more does not fit.")
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Show the settings that fit and are the fastest by the estimate.")
    ] = False,
) -> None:
    """Estimates memory, time and traffic. Exit code 0: the run fits; 1: it does not; 2: usage error.

    With --advise: 0: some settings fit on every number of nodes, those of LoRA left out unless the recipe has it.
    """
    config = load_config(recipe, overrides)
    check_scoring(config.evaluation)
    find_gpu(gpu)
    mem_bytes = None if mem is None else mem * GIB
    # Imported here: torch and transformers take seconds to import; the other commands need neither.
    from launch.planner.estimate import estimate

    if advise:
        show_advice(config, nodes, gpus_per_node, gpu, mem_bytes)
        return
    found = [estimate(config, number, gpus_per_node, gpu, mem_bytes) for number in nodes]
    console = wide_console()
    if found[0].rows.num_samples is None:
        console.print(not_found(config), markup=False, soft_wrap=True)
    console.print(table(found, config.train.stage))
    for words in (*assumptions(config, found), "", *(each.verdict for each in found)):
        console.print(words, markup=False, soft_wrap=True)
    if not all(each.fits for each in found):
        raise typer.Exit(1)


def show_advice(config: Config, nodes: list[int], gpus_per_node: int, gpu: str, mem_bytes: float | None) -> None:
    """Prints the settings that fit, for the recipe and, if it has none, with an adapter."""
    from launch.planner.advise import advice, advise, with_lora

    console = wide_console()
    fits = True
    for number in nodes:
        ways = advise(config, number, gpus_per_node, gpu, mem_bytes)
        fits &= ways[0].found.fits
        shown = [advice(ways, config.train.stage)]
        if config.model.lora is None and find_spec("peft") is not None:
            lora, words_of_lora = with_lora(config)
            ways = advise(lora, number, gpus_per_node, gpu, mem_bytes, words_of_lora)
            shown.append(advice(ways, f"{config.train.stage} with LoRA"))
        for table_of_ways, words in shown:
            if table_of_ways:
                console.print(table_of_ways)
            console.print(words, markup=False, soft_wrap=True)
    if find_spec("peft") is None:
        console.print("LoRA was not tried: peft is not installed (the extra `lora`).", markup=False, soft_wrap=True)
    if mem_bytes is None:
        console.print("Host memory was not compared: set --mem to the GiB of a node.", soft_wrap=True)
    if not fits:
        raise typer.Exit(1)


def not_found(config: Config) -> str:
    """That the figures are of no data of the user's, and what may be wrong with the paths."""
    paths = [without_secrets(str(each.path)) for each in config.data.sets]
    hints = ""
    if any("," in path for path in paths):
        hints += "; a list of folders needs brackets: data.shards=[A,B]"
    if any(re.match(r"\w+:/", path) and not is_url(path) for path in paths):
        hints += "; a URL needs ://"
    return f"NO SHARDS at {', '.join(paths)} (data.shards): what follows is for assumed rows{hints}"


def table(found: list["Estimate"], stage: str) -> Table:
    """One column for each number of nodes."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column(f"estimate for {stage}, by nodes of {found[0].gpus_per_node} x {found[0].gpu}")
    for each in found:
        shown.add_column(str(each.nodes), justify="right")
    columns = [dict(figures(each)) for each in found]
    for name in columns[0]:
        shown.add_row(name, *(column[name] for column in columns))
    return shown


def figures(found: "Estimate") -> list[tuple[str, str]]:
    """Each figure with its name and unit."""
    memory = found.memory
    parts = {
        "parameters": memory.parameters,
        "optimizer states": memory.optimizer,
        "sharded gradients and bucket": memory.gradients,
        "gathered weights": memory.gathered,
        "activations": memory.activations,
        "logits": memory.logits,
        "gather buffer": memory.gathering,
        "full gradients (with reduction copy)": memory.full_gradients + memory.reducing,
        "optimizer-step buffer": memory.update,
        **({"evaluation (whole model and cache)": memory.evaluation} if memory.evaluation else {}),
        "peak": memory.peak,
    }
    rows = [(f"GiB per GPU: {name}", f"{size / GIB:.1f}") for name, size in parts.items()]
    if found.offload_bytes:
        rows.append(("GiB per node: host memory for offload", f"{found.offload_bytes / GIB:.1f}"))
    rows += [
        ("fits", "yes" if found.fits else "no"),
        ("samples per step", str(found.samples_per_step)),
        ("micro-batch", str(found.micro_batch_size)),
        ("GB per GPU and step: NVLink", f"{found.traffic.nvlink / GB:.0f}"),
        ("GB per GPU and step: network", f"{found.traffic.network / GB:.1f}"),
        *times(found),
        ("GB per checkpoint", rounded(found.checkpoint_bytes / GB)),
        ("GB per node: host memory for its copy", rounded(found.host_copy_bytes / GB)),
    ]
    return rows


def rounded(size: float) -> str:
    """With a decimal where it matters: an adapter's checkpoint is small."""
    return f"{size:.0f}" if size >= 10 or not size else f"{size:.1f}"


def times(found: "Estimate") -> list[tuple[str, str]]:
    """The time of a step, and what follows from it."""
    time = found.time
    if time is None or found.samples_per_day is None:
        return [("seconds per step", "no estimate with offload")]
    waiting_s = max(0.0, time.step_s - time.compute_s - time.passes_s - time.update_s)  # not minus rounding
    epochs = found.epochs_per_day
    return [
        ("seconds per step", f"{time.step_s:.2f}"),
        ("of these, waiting for communication", f"{waiting_s:.2f}"),
        ("MFU, %", f"{100 * time.mfu:.1f}"),
        *([] if found.packed else best_micro_batch(found)),
        ("samples per day, thousands", f"{found.samples_per_day / 1000:.0f}"),
        ("epochs per day", "no shards" if epochs is None else f"{epochs:.1f}"),
    ]


def best_micro_batch(found: "Estimate") -> list[tuple[str, str]]:
    """What another cut of the global batch would give; packed rows have none."""
    best = found.fastest
    return [
        ("micro-batch with the best time", "none fits" if best is None else str(best[0])),
        ("seconds per step with it", "-" if best is None else f"{best[1]:.2f}"),
    ]


def assumptions(config: Config, estimates: list["Estimate"]) -> list[str]:
    """How the peak is computed, and the assumptions of the table."""
    found = estimates[0]
    largest, mean = found.rows.largest, found.rows.mean
    fed = f"; {mean.latents} latents fed back on average, at most {largest.latents}" if largest.latents else ""
    samples = "an unknown number of samples"
    if found.rows.num_samples is not None:
        samples = f"{found.rows.num_rows} samples, {found.rows.num_samples} in an epoch"
    return [
        "peak         parameters + optimizer states + sharded gradients and bucket + max(optimizer-step buffer, "
        "gathered weights + activations + logits + max(gather buffer, full gradients))",
        f"model        {config.model.path}: {sum(found.sizes.all) / 1e9:.2f} G elements, {config.train.stage}, "
        f"{config.train.dtype}",
        f"rows         {samples}; {mean.tokens} tokens and {mean.patches} patches on average, at most "
        f"{largest.tokens} and {largest.patches} ({found.rows.source}){fed}",
        *map(describe_level, estimates),
        f"assumed      {COMPUTE_EFFICIENCY:.0%} of the peak rate, {MEMORY_EFFICIENCY:.0%} of the memory bandwidth, "
        f"{LINK_EFFICIENCY:.0%} of NVLink's and the network's, {USABLE:.0%} of the memory (mirage_ds/sizing/gpus.py)",
        "checked      on a small CPU run (10%): parameters, optimizer states, gradients, logits, kept activations",
        "not checked  gather and reduction buffers, optimizer-step buffer, offload, every time; "
        "on one H200 a step of 3B took 2.3 (stage 1) and 4.7 times (stage 2) as long (docs/results.md)",
    ]


def describe_level(found: "Estimate") -> str:
    """What the deal of the run's samples adds to the times."""
    level = found.level
    micro_steps = f"; {level.micro_steps:.1f} micro-steps per step" if found.packed else ""
    if found.rows.num_samples is None:
        return "deal         no shards, so times are those of level ranks and rows without padding" + micro_steps
    return (
        f"deal         of the first steps on {found.nodes} x {found.gpus_per_node} GPUs, texts estimated from "
        f"characters: imbalance {level.imbalance:.2f}, {level.padding:.0%} padding; with both, computing takes "
        f"{level.factor:.2f} times as long{micro_steps}"
    )
