"""`mirage-launch plan`: sizes against the published models and a real one, verdicts, advice, refusals, exit codes.

tests/distributed/test_plan_memory.py compares memory by kind with a real run. No test checks times.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_set
import pytest
import yaml
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from launch.cli import app
from launch.planner.estimate import check_fits, estimate
from launch.planner.level import Level
from launch.planner.plan import describe_level, figures
from launch.planner.time_estimate import step_time, traffic
from launch.slurm import submit as slurm
from launch.slurm.cluster import Cluster
from mirage_ds.config import Config, ModelConfig
from mirage_ds.errors import ConfigError, MirageError
from mirage_ds.recipe import load_config
from mirage_ds.sizing import model_sizes
from mirage_ds.sizing.gpus import GPUS
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.workload import Row
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

RECIPES = Path(__file__).parents[4] / "launch" / "recipes"
BATCH = "train.global_batch_size=128"
# Numbers of parameters on the models' pages on huggingface.co.
PUBLISHED = {
    "3B": 3_754_622_976,
    "7B": 8_292_166_656,
    "32B": 33_452_718_336,
    "72B": 73_410_777_344,
}


def recipe(stage: int, *overrides: str) -> Config:
    return load_config(RECIPES / f"qwen2.5-vl-7b-stage{stage}.yaml", [BATCH, "data.shards=gone", *overrides])


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_have_their_published_size(size: str) -> None:
    sizes = model_sizes.model_sizes(ModelConfig(path=f"Qwen/Qwen2.5-VL-{size}-Instruct"))
    assert sum(sizes.all) == PUBLISHED[size]
    assert bool(sizes.head) == (size != "3B")  # tied


def test_a_folder_has_the_sizes_of_its_weights() -> None:
    sizes = model_sizes.model_sizes(ModelConfig(path=golden_set.MODEL))
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden_set.MODEL)
    assert sum(sizes.all) == sum(parameter.numel() for parameter in hf.parameters())
    assert sum(sizes.tower) == sum(parameter.numel() for parameter in hf.model.visual.parameters())
    assert (sizes.hidden, sizes.kv_heads, sizes.head_dim, sizes.vocab) == (64, 2, 16, 1000)


def test_a_folder_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"\(model.path=./gone\); allowed: a folder, or one of Qwen/.*; set model"):
        model_sizes.model_sizes(ModelConfig(path="./gone"))


def test_more_nodes_take_less_sharded_memory_per_gpu() -> None:
    one, two = (estimate(recipe(1), nodes, 8, "h100-80gb") for nodes in (1, 2))
    assert two.memory.optimizer == pytest.approx(one.memory.optimizer / 2, rel=1e-6)
    assert two.memory.gathered == one.memory.gathered
    assert one.traffic.network == 0 < two.traffic.network
    trained = sum(one.sizes.language)
    assert one.memory.optimizer == pytest.approx(12 * trained / 8, rel=1e-6)
    assert one.checkpoint_bytes == 12 * trained + 2 * sum(one.sizes.tower)
    assert (one.host_copy_bytes, two.host_copy_bytes) == (one.checkpoint_bytes, -(-one.checkpoint_bytes // 2))
    assert estimate(recipe(1, "checkpoint.mode=blocking"), 1, 8, "h100-80gb").host_copy_bytes == 0
    assert one.fits
    assert one.verdict.startswith("fits: ")
    assert one.epochs_per_day is None  # without shards


def test_a_rollout_is_gathered_completely() -> None:
    rollout, layer = (estimate(recipe(2, f"model.gather={gather}"), 1, 8, "h100-80gb") for gather in ("auto", "layer"))
    assert rollout.memory.gathered == pytest.approx(2 * sum(rollout.sizes.language), rel=0.01)
    assert layer.memory.gathered < rollout.memory.gathered / 4
    assert layer.traffic.gathered > rollout.traffic.gathered


def test_each_pass_of_stage_2_takes_its_time() -> None:
    """Of a row with 2 blocks, 10 latents in all: 8 passes over one column, each with 2 readings of the layers' weights
    (3 where it is recomputed); 3 longer passes, whose gradients are added up, as tests/unit/model/test_rollout.py
    counts: 2 sums, each of 2 readings and a writing, and one product that is added to them. Groups make no sums."""
    row, gpu = Row(tokens=900, targets=90, patches=400, blocks=2, single_columns=8), GPUS["h100-80gb"]
    sizes = model_sizes.model_sizes(recipe(2).model)
    for batch, gather, micro_steps, readings, sums in (
        (1, "rollout", 16, 2, 2),
        (4, "rollout", 4, 3, 2),
        (1, "layer", 16, 2, 0),
        (4, "groups", 4, 3, 0),
    ):
        config = recipe(2, f"train.micro_batch_size_per_gpu={batch}", f"model.gather={gather}")
        found = step_time(sizes, config, resolve_deepspeed_config(config), row, 1, 8, gpu, Level(micro_steps))
        accesses = micro_steps * (8 * readings + sums * 3 + 2)
        assert found.passes_s == pytest.approx(accesses * 2 * sum(sizes.layers) / (0.8 * 3.35e12))
    one_pass = replace(row, blocks=0, single_columns=0)
    assert step_time(sizes, config, resolve_deepspeed_config(config), one_pass, 1, 8, gpu, Level(1)).passes_s == 0


@pytest.mark.parametrize(("gather", "groups"), [("layer", 28), ("groups", 7)])
def test_layers_are_gathered_in_each_pass(gather: str, groups: int) -> None:
    """Of the 28 of the 7B, each twice in every pass; the last group of forward is the first one of backward."""
    row = Row(tokens=900, targets=90, patches=400, blocks=2)
    config = recipe(2, f"model.gather={gather}", "train.micro_batch_size_per_gpu=1")
    sizes, settings = model_sizes.model_sizes(config.model), resolve_deepspeed_config(config)
    ten, two = (
        traffic(sizes, config, settings, replace(row, single_columns=singles), 1, 8, 16).gathered for singles in (8, 0)
    )
    layers = sum(sizes.layers)
    assert ten - two == pytest.approx(16 * 8 * 2 * 2 * layers * 7 / 8)
    once = sum(sizes.tower) + 2 * (sum(sizes.language) - layers) - layers / groups
    assert two == pytest.approx(16 * 2 * (once + 3 * 2 * layers) * 7 / 8)


def test_groups_hold_two_at_a_time_and_no_whole_gradients() -> None:
    """Of the 72B on 16 nodes, whose rollout fits on no GPU."""
    path = "model.path=Qwen/Qwen2.5-VL-72B-Instruct"
    rollout, groups = (
        estimate(recipe(2, path, f"model.gather={gather}"), 16, 8, "h100-80gb") for gather in ("rollout", "groups")
    )
    layer = sum(groups.sizes.layers) / 80
    assert groups.memory.gathered == pytest.approx(2 * (2 * 4 * layer + max(groups.sizes.head)), rel=0.01)
    assert groups.memory.full_gradients == 2 * max(groups.sizes.head)
    assert rollout.memory.full_gradients > 50 * groups.memory.full_gradients
    assert not rollout.fits
    assert groups.fits


@pytest.mark.parametrize(("name", "least"), [("32b", 2), ("72b", 4)])
@pytest.mark.parametrize("stage", [1, 2])
def test_recipes_of_large_models_fit_as_they_say(name: str, stage: int, least: int) -> None:
    """On so many nodes of 8 H100, and not on half of them."""
    path = RECIPES / f"qwen2.5-vl-{name}-stage{stage}.yaml"
    assert f"at least {least} nodes of 8 H100" in " ".join(path.read_text().replace("#", "").split())
    config = load_config(path, ["data.shards=gone"])
    assert estimate(config, least, 8, "h100-80gb").fits
    assert not estimate(config, least // 2, 8, "h100-80gb").fits


def test_a_run_that_does_not_fit_is_refused_with_what_to_change() -> None:
    config = recipe(2)
    with pytest.raises(
        ConfigError, match=r"does not fit .*\(model.path=Qwen/.* on 2 x 2 a100-40gb\).*GiB available; use "
    ) as no:
        check_fits(config, 2, 2, "a100-40gb")
    found = estimate(config, 2, 2, "a100-40gb")
    assert not found.fits
    assert found.verdict.startswith("does not fit: ")
    assert found.advice
    for advice in found.advice:
        assert advice in str(no.value)
        assert_it_helps(config, advice)


def assert_it_helps(config: Config, advice: str) -> None:
    """Applies one piece of advice; the run then fits on nodes of 2 GPUs."""
    words = advice.split()
    nodes = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 2
    changed: dict[str, Any] = config.model_dump()
    for word in words:
        if "=" in word:
            key, _, value = word.partition("=")
            section, name = key.split(".")
            changed[section][name] = yaml.safe_load(value)
    check_fits(Config.model_validate(changed), nodes, 2, "a100-40gb")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("gpu", ["h100-80gb", "a100-40gb"])
def test_the_best_micro_batch_is_that_of_a_search(stage: int, gpu: str) -> None:
    """Every number that divides a rank's 64 samples as the recipe's own; auto takes the largest that fits."""
    batch = "train.global_batch_size=512"
    tried = {}
    for size in range(1, 65):
        if 64 % size == 0:
            found = estimate(recipe(stage, batch, f"train.micro_batch_size_per_gpu={size}"), 1, 8, gpu)
            assert found.micro_batch_size == size
            if found.fits:
                tried[size] = found.time.step_s
    auto = estimate(recipe(stage, batch), 1, 8, gpu)
    if not tried:
        assert (auto.micro_batch_size, auto.fits, auto.fastest) == (1, False, None)
        return
    assert auto.micro_batch_size == max(tried)
    best = min(tried.values())
    assert auto.fastest[1] == pytest.approx(best)
    assert tried[auto.fastest[0]] == pytest.approx(best)
    assert all(tried[size] > best * (1 + 1e-6) for size in tried if size < auto.fastest[0])


def test_a_large_micro_batch_is_told_of_auto() -> None:
    """With the same samples per step, which the recipe gives in another way."""
    shape = ["train.global_batch_size=null", "train.micro_batch_size_per_gpu=64"]
    config = recipe(2, *shape, "train.gradient_accumulation_steps=2")
    found = estimate(config, 1, 8, "h100-80gb")
    advice = (
        "train.micro_batch_size_per_gpu=auto with train.global_batch_size=1024 with "
        "train.gradient_accumulation_steps=null"
    )
    assert advice in found.advice
    check_fits(recipe(2, *[word for word in advice.split() if "=" in word]), 1, 8, "h100-80gb")


def test_offload_has_no_time() -> None:
    found = estimate(recipe(1, "distributed.deepspeed_config=zero3_offload.json"), 1, 8, "h100-80gb")
    assert found.memory.optimizer == 0
    assert found.time is found.fastest is None
    assert found.samples_per_day is None


def test_offload_needs_host_memory() -> None:
    """Of a node: 20 bytes per trained parameter for the optimizer, 2 per parameter in bf16; half of it on two nodes."""
    offloaded = recipe(1, "distributed.deepspeed_config=zero3_offload.json")
    one, two = (estimate(offloaded, nodes, 8, "h100-80gb") for nodes in (1, 2))
    trained, everything = sum(one.sizes.language), sum(one.sizes.all)
    assert one.offload_bytes == pytest.approx(20 * trained + 2 * everything, rel=1e-5)
    assert two.offload_bytes == pytest.approx(one.offload_bytes / 2, rel=1e-5)
    assert dict(figures(one))["GiB per node: host memory for offload"] == f"{one.offload_bytes / 2**30:.1f}"
    kept = estimate(recipe(1), 1, 8, "h100-80gb")
    assert not [name for name, _ in figures(kept) if "offload" in name]


@pytest.fixture
def two_rows(tmp_path: Path) -> str:
    """A setting: shards, as far as their index, of a small and a large row."""
    entry = {"key": "a", "shard": 0, "offset": 0, "size": 0, "image_blocks": 1, "latent_blocks": 1}
    small = entry | {"input_sizes": [[56, 84]], "helper_sizes": [[56, 56]], "question_chars": 30, "answer_chars": 60}
    large = small | {"key": "b", "input_sizes": [[280, 280]], "answer_chars": 300}
    index = "".join(json.dumps(line) + "\n" for line in (small, large)).encode()
    (tmp_path / "index.jsonl").write_bytes(index)
    manifest = {
        "format_version": 1,
        "num_samples": 2,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "shards": [{"name": "a.tar", "samples": 2, "bytes": 0, "sha256": ""}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return f"data.shards={tmp_path}"


def test_row_sizes_are_those_of_the_shards(two_rows: str) -> None:
    rows = workload(recipe(1, two_rows))
    assert rows.num_samples == 2
    assert rows.largest.patches == 400 + 16  # the image and the helper image; 14 pixels a side
    # template 30, question 10, answer 100, 10 x 10 merged patches and their 2 markers, K = 4 and 2 markers
    assert rows.largest.tokens == 30 + 10 + 100 + 100 + 2 + 6
    assert rows.mean.patches == (24 + 16 + 400 + 16) // 2
    assert workload(recipe(2, two_rows)).largest.patches == 400  # no helper images in stage 2
    assert estimate(recipe(1, two_rows), 1, 8, "h100-80gb").epochs_per_day is not None


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_computing_takes_longer_by_imbalance_and_padding(two_rows: str, micro_batch: int) -> None:
    """Every two samples of the order are a small and a large one. Dealt by cost, a micro-step has equal ones; in order,
    ranks differ with micro-batches of 1, and those of 4 have padding."""
    shape = (f"train.micro_batch_size_per_gpu={micro_batch}", two_rows)
    balanced, in_order = (
        estimate(recipe(1, *shape, f"data.balance={value}"), 1, 8, "h100-80gb") for value in ("true", "false")
    )
    assert (balanced.level.imbalance, balanced.level.padding) == (1, 0)
    small, large = 30 + 10 + 20 + 6 + 2 + 6, 30 + 10 + 100 + 100 + 2 + 6  # as above
    small_cost, large_cost = 25 * small + 24 + 16, 25 * large + 400 + 16
    expected = {1: (2 * large_cost / (small_cost + large_cost), 0), 4: (1, 1 - (small + large) / (2 * large))}
    assert (in_order.level.imbalance, in_order.level.padding) == pytest.approx(expected[micro_batch])
    computed = {1: 2 * large_cost, 4: 2 * 25 * large + 24 + 16 + 400 + 16}[micro_batch]
    longer = computed / (small_cost + large_cost)
    assert in_order.time.compute_s == pytest.approx(longer * balanced.time.compute_s)
    words = describe_level(in_order)
    assert "estimated from characters" in words
    assert f"imbalance {in_order.level.imbalance:.2f}" in words
    assert f"{longer:.2f} times as long" in words


def test_packed_rows_take_fewer_micro_steps(two_rows: str) -> None:
    """32 samples of 8 ranks, half of them small: a packed row of two large or of one large and more small ones. What is
    computed is the same; what is gathered and reduced is less by as much as there are fewer micro-steps."""
    shape = ("train.global_batch_size=32", "train.micro_batch_size_per_gpu=1")
    one_by_one, packed = (
        estimate(recipe(1, *shape, *settings), 1, 8, "h100-80gb")
        for settings in ((two_rows,), (two_rows, "data.packing=true", "data.token_budget=400"))
    )
    assert (one_by_one.level.micro_steps, packed.level.micro_steps) == (4, 2)
    assert packed.traffic.nvlink == pytest.approx(one_by_one.traffic.nvlink / 2)
    assert packed.time.communication_s == pytest.approx(one_by_one.time.communication_s / 2)
    assert (packed.fastest, one_by_one.fastest is None) == (None, False)
    assert "micro-batch with the best time" not in dict(figures(packed))
    assert describe_level(packed).endswith("; 2.0 micro-steps per step")


def test_packed_rows_without_shards_are_of_assumed_samples() -> None:
    """4 samples of each rank, of which a packed row has 2, or 1 if it has no room for 2."""
    tokens = estimate(recipe(1), 1, 8, "h100-80gb").rows.mean.tokens
    packing = ("train.global_batch_size=32", "train.micro_batch_size_per_gpu=1", "data.packing=true")
    for budget, micro_steps in ((3 * tokens - 1, 2), (2 * tokens - 1, 4)):
        found = estimate(recipe(1, *packing, f"data.token_budget={budget}"), 1, 8, "h100-80gb")
        assert found.level.micro_steps == micro_steps
    with pytest.raises(ConfigError, match=r"nothing to pack: .* 32 on 32 ranks"):
        estimate(recipe(1, *packing, f"data.token_budget={2 * tokens}"), 4, 8, "h100-80gb")


def plan(*arguments: str) -> tuple[int, str]:
    name = str(RECIPES / "qwen2.5-vl-7b-stage2.yaml")
    result = CliRunner().invoke(app, ["plan", name, "--gpus-per-node", "8", *arguments, "data.shards=gone"])
    if isinstance(result.exception, MirageError):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_says_whether_it_fits() -> None:
    code, output = plan("--nodes", "1", "--nodes", "2", "--gpu", "h100-80gb", BATCH)
    assert code == 0
    for words in (
        "| GiB per GPU: peak",
        "seconds per step",
        "epochs per day",
        "| micro-batch ",
        "| micro-batch with the best time ",
        "no shards at gone",
        "no shards, so times are those of level ranks and rows without padding",
        "not checked  gather and reduction buffers, optimizer-step buffer, offload, every time; "
        "on one H200 a step of 3B took 2.3 (stage 1) and 4.7 times (stage 2) as long (docs/results.md)",
    ):
        assert words in output
    code, output = plan("--nodes", "1", "--gpu", "a100-40gb", BATCH)
    assert code == 1
    assert "does not fit" in output
    assert "; use " in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h100"], r"\(--gpu h100\): did you mean 'h100-80gb'\?"),
        (["--gpu", "h100-80gb", "--nodes", "2"], "global_batch_size=8 does not divide over 16 ranks .*=16, or"),
        (["--gpu", "h100-80gb", "model.path=./gone"], "the model folder does not exist"),
        (["--gpu", "h100-80gb", "train.lrr=1"], "train.lrr"),
    ],
)
def test_wrong_usage_is_a_user_error(arguments: list[str], words: str) -> None:
    """`main` turns such an error into exit code 2."""
    with pytest.raises(ConfigError, match=words):
        plan(*([] if "--nodes" in arguments else ["--nodes", "1"]), *arguments)


def test_slurm_refuses_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "check_inputs", lambda config: None)  # there are no shards here
    slurm.check_job(recipe(2), Cluster(gpus_per_node=8, gpu="h100-80gb"), nodes=1)
    with pytest.raises(ConfigError, match=r"the run does not fit .*; use "):
        slurm.check_job(recipe(2), Cluster(gpus_per_node=8, gpu="a100-40gb"), nodes=1)
    slurm.check_job(recipe(2), Cluster(gpus_per_node=8), nodes=1)
    slurm.check_job(recipe(2), Cluster(ranks_per_node=8, gpu="a100-40gb"), nodes=1)  # these ranks use the CPU


def test_the_specifications_of_every_gpu_are_plausible() -> None:
    for gpu in GPUS.values():
        assert gpu.flops["bf16"] > gpu.flops["fp32"]
        assert gpu.memory_bandwidth > gpu.nvlink_bandwidth > gpu.network_bandwidth


@pytest.mark.parametrize(
    ("shards", "hint"), [("s1,s2", "a list of folders needs brackets"), ("s3:/bucket/shards", "a URL needs ://")]
)
def test_a_mistyped_folder_is_named_above_the_table(shards: str, hint: str) -> None:
    name = str(RECIPES / "qwen2.5-vl-7b-stage2.yaml")
    options = ["--gpus-per-node", "8", "--nodes", "1", "--gpu", "h100-80gb", BATCH, f"data.shards={shards}"]
    above = CliRunner().invoke(app, ["plan", name, *options]).output.partition("| GiB per GPU")[0]
    assert f"NO SHARDS at {shards}" in above
    assert hint in above
