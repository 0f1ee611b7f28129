"""`mirage-launch plan --advise`: what it says to paste fits by the estimate of the pasted words; a clear no; the host.

The table of docs/planner.md is what it says today.
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.planner.advise import Way, advise, with_lora
from launch.planner.estimate import check_fits, estimate
from launch.slurm.cluster import Cluster
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import load_config

ROOT = Path(__file__).parents[4]
RECIPE = ROOT / "launch" / "recipes" / "qwen2.5-vl-7b-stage2.yaml"
GIB = 2**30
HARDWARE = {
    "1 x rtx4090-24gb": (1, 1, "rtx4090-24gb"),
    "1 x l40s-48gb": (1, 1, "l40s-48gb"),
    "1 x h100-80gb": (1, 1, "h100-80gb"),
    "1 node": (1, 8, "h100-80gb"),
    "4 nodes": (4, 8, "h100-80gb"),
    "16 nodes": (16, 8, "h100-80gb"),
}
"""Of the table's columns: nodes, GPUs per node, GPU."""


def recipe(size: str, *overrides: str) -> Config:
    path = f"model.path=Qwen/Qwen2.5-VL-{size}-Instruct"
    return load_config(RECIPE, [path, "train.global_batch_size=128", "data.shards=gone", *overrides])


def cell(ways: list[Way]) -> str:
    """The first way, as the table has it: gather, micro-batch, GiB per GPU, seconds of a step."""
    first = ways[0]
    if not first.found.fits:
        least = min(way.found.memory.peak for way in ways)
        return f"no: {least / GIB:.1f}"
    values = dict(word.split("=") for word in first.settings)
    gather = f"groups of {values['model.gather_layers']}" if "model.gather_layers" in values else values["model.gather"]
    words = [gather, *(["stored"] if values["model.activation_checkpointing"] == "none" else [])]
    words += ["offload"] if "distributed.deepspeed_config" in values else []
    words += [f"micro-batch {first.found.micro_batch_size}", f"{first.found.memory.peak / GIB:.1f} GiB"]
    return ", ".join(words + ([] if first.step_s is None else [f"{first.step_s:.2f} s"]))


def row(size: str, *, lora: bool) -> list[str]:
    """A line of the table."""
    return [f"{size}{', LoRA' if lora else ''}", *(cell(ways_of(size, each, lora=lora)) for each in HARDWARE)]


def ways_of(size: str, hardware: str, *, lora: bool) -> list[Way]:
    config, words = with_lora(recipe(size)) if lora else (recipe(size), ())
    return advise(config, *HARDWARE[hardware], None, words)


@pytest.mark.parametrize(("size", "lora"), [("3B", False), ("72B", True)])
def test_the_table_of_the_documents(size: str, lora: bool) -> None:
    lines = (ROOT / "docs" / "planner.md").read_text().splitlines()
    assert f"| {' | '.join(row(size, lora=lora))} |" in lines


@pytest.mark.parametrize(("size", "hardware", "lora"), [("7B", "1 node", False), ("72B", "16 nodes", True)])
def test_what_is_pasted_fits_and_is_what_was_advised(size: str, hardware: str, lora: bool) -> None:
    """Read again as a user gives it, behind a recipe that has other settings, every way that fits has the memory and
    the time that were shown."""
    ways = [way for way in ways_of(size, hardware, lora=lora) if way.found.fits]
    assert len(ways) > 3
    for way in ways:
        pasted = recipe(size, "model.gather=groups", "model.gather_layers=2", *way.overrides)
        assert (pasted.model.lora is not None) == lora
        again = estimate(pasted, *HARDWARE[hardware])
        assert again.fits
        assert again.memory == way.found.memory
        assert again.time == way.found.time
    timed = [way.step_s for way in ways if way.step_s is not None]
    assert timed == sorted(timed)
    assert [way.step_s is None for way in ways] == sorted(way.step_s is None for way in ways)


def test_a_recipe_that_trains_the_tower() -> None:
    """LoRA trains nothing of it: the line to paste unsets it."""
    own = recipe("7B", "model.train_tower=true", "model.freeze=[model.language_model.norm.*]")
    config, words = with_lora(own)
    assert (
        config.model
        == recipe("7B", "model.train_tower=true", "model.freeze=[model.language_model.norm.*]", *words).model
    )


def test_nothing_is_faster_by_another_micro_batch() -> None:
    first = advise(recipe("7B"), 1, 8, "h100-80gb")[0]
    assert first.step_s is not None
    for size in (1, 2, 4, 8, 16):
        other = estimate(recipe("7B", *first.settings, f"train.micro_batch_size_per_gpu={size}"), 1, 8, "h100-80gb")
        assert not other.fits or other.time.step_s >= first.step_s - 1e-3


def run(*arguments: str) -> tuple[int, str]:
    command = ["plan", str(RECIPE), "train.global_batch_size=128", *arguments, "--advise"]
    result = CliRunner().invoke(app, command)
    return result.exit_code, " ".join(result.output.split())


def test_the_command() -> None:
    """Exit code 0 where the recipe fits, 1 where only an adapter does; a line to paste for each."""
    code, output = run("--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100-80gb")
    assert code == 0
    assert "stage2, the first of" in output
    assert "train.micro_batch_size_per_gpu=" in output
    assert re.search(r"stage2 with LoRA, the first of \d+ that fit: model.lora.rank=16 model.gather=", output)
    assert "Host memory was not compared" in output


def test_a_clear_no() -> None:
    path = "model.path=Qwen/Qwen2.5-VL-72B-Instruct"
    code, output = run(path, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "rtx4090-24gb", "--mem", "64")
    assert code == 1
    assert "stage2: no setting fits; the one with the least memory does not fit: needs" in output
    assert "stage2 with LoRA: no setting fits" in output


def test_where_only_the_host_lacks_memory() -> None:
    """Offload would fit on the GPU: that is what the message is about, and the advice is no circle."""
    path = "model.path=Qwen/Qwen2.5-VL-3B-Instruct"
    code, output = run(path, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "rtx4090-24gb", "--mem", "64")
    assert code == 1
    assert re.search(r"stage2: no setting fits; .* needs [\d.]+ GiB of host memory per node", output)
    found = estimate(recipe("3B"), 1, 1, "rtx4090-24gb", 64 * GIB)
    assert not [each for each in found.advice if each == "distributed.deepspeed_config=zero3_offload.json"]
    assert "distributed.deepspeed_config=zero3_offload.json" in estimate(recipe("3B"), 1, 1, "rtx4090-24gb").advice


def test_too_little_host_memory_is_refused_with_what_needs_it() -> None:
    """Of the node, by SLURM's --mem or by --mem: what is offloaded, and the copy of a checkpoint."""
    offloaded = recipe("7B", "distributed.deepspeed_config=zero3_offload.json")
    needed = estimate(offloaded, 1, 8, "h100-80gb")
    check_fits(offloaded, 1, 8, "h100-80gb", mem_bytes=1.2 * needed.host_bytes)
    with pytest.raises(ConfigError, match=r"does not fit in the nodes' memory .* for what is offloaded, .* checkpoint"):
        check_fits(offloaded, 1, 8, "h100-80gb", mem_bytes=needed.host_bytes)
    blocking = recipe("7B", "distributed.deepspeed_config=zero3_offload.json", "checkpoint.mode=blocking")
    check_fits(blocking, 1, 8, "h100-80gb", mem_bytes=needed.host_bytes)
    kinds = {"500G": 500 * GIB, "512000": 512000 * 2**20, "2T": 2 * 2**40, "0": None, "partition": None, None: None}
    for mem, expected in kinds.items():
        assert Cluster(mem=mem).mem_bytes == expected
