"""Training under ZeRO-3, on 2 ranks and on 1, against the independent loop of plain PyTorch and transformers.

Real processes and collectives (gloo), small models; every loss and gradient norm of every step is compared.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import golden_set
import plain_loop
import pytest
import worker
from cases import (
    BLOCKS,
    BLOCKS_STEPS,
    CUT_STEPS,
    CUTS,
    DEEP_LAYERS,
    FIXED,
    GATHER_SIZES,
    GATHERS,
    HIDDEN_GATHERS,
    MANY_RAGGED_STEPS,
    RAGGED_CUTS,
    RAGGED_STEPS,
    VARYING,
    Outcome,
    all_cases,
    read_outcome,
    start_cases,
)
from deviations import check
from random_samples import ragged_batch

from launch.planner.time_estimate import gathered_elements
from mirage_ds.config import Config, TrainConfig
from mirage_ds.data.collate import collate
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.zero3.engine import learning_rate

Outcomes = Callable[[str], Outcome]


def rates(steps: int, **settings: Any) -> list[float]:
    train = TrainConfig(stage="text", max_steps=steps, **({"lr": 1e-3, "warmup_steps": 2} | settings))
    return [learning_rate(step, steps, train) for step in range(1, steps + 1)]


@cache
def plain(
    folder: str,
    stage: str,
    kind: str,
    steps: int,
    size: int,
    lrs: tuple[float, ...],
    train_tower: bool = False,
    hides_images: bool = False,
):
    """The independent loop on the samples of a case; once for all splits of the same global batches."""
    sizes = {"fixed": FIXED, "varying": VARYING, "blocks": BLOCKS, "ragged": None}[kind]
    batches = [
        ragged_batch(step, size, stage=stage, latent_sizes=sizes and sizes[step % len(sizes)]) for step in range(steps)
    ]
    return plain_loop.train(
        folder,
        [[vars(sample) | {"hides_images": hides_images} for sample in batch] for batch in batches],
        stage,
        lrs=list(lrs),
        ce_loss_weight=0.1 if stage == "stage1" else 1.0,
        train_tower=train_tower,
    )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "tied"), [("fixed", "untied"), ("varying", "tied")])
@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_any_cut_gives_the_losses_of_the_plain_loop(
    outcome: Outcomes, models: dict[str, str], stage: str, kind: str, tied: str, cut: str
) -> None:
    """Every step; K the same everywhere, or different for every sample: from step to step and between the ranks."""
    expected = plain(models[tied], stage, kind, CUT_STEPS, 4, tuple(rates(CUT_STEPS)))
    result = outcome(f"{stage}-{kind}-{tied}-{cut}")
    assert result.losses == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tied", ["untied", "tied"])
def test_several_blocks(outcome: Outcomes, models: dict[str, str], tied: str, ranks: int) -> None:
    """Stage 2, rows of 0 to 3 blocks of K 2 and 8. Untied, ranks make different numbers of passes; tied, they gather
    layer by layer and agree on one."""
    # The method's own rate, as below.
    lrs = tuple(rates(BLOCKS_STEPS, lr=1e-5, lr_decay="constant"))
    expected = plain(models[tied], "stage2", "blocks", BLOCKS_STEPS, 4, lrs)
    result = outcome(f"blocks-{tied}-{ranks}")
    assert result.losses == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("stage", HIDDEN_GATHERS)
def test_hidden_images(outcome: Outcomes, models: dict[str, str], stage: str) -> None:
    """Rows of 0 to 3 blocks, whose images are hidden in other columns, and other numbers of them, on each rank. Stage 1
    gathers layer by layer, where the ranks agree on the passes; stage 2 the rollout."""
    settings = {"model": {"answer_sees_image": False}}
    shape = {"micro_batch": 2, "latent_sizes": BLOCKS, "settings": settings}
    case = worker.Case("", "", "", stage, BLOCKS_STEPS, **shape)
    places = [
        [collate(samples, align_latents=False).hide_columns for samples in worker.samples_of(case, each)]
        for each in (worker.steps_of(case, rank, 2) for rank in (0, 1))
    ]
    assert {len(one) - len(other) for one, other in zip(*places, strict=True)} != {0}
    lrs = tuple(rates(BLOCKS_STEPS, lr=1e-5, lr_decay="constant"))
    expected = plain(models["untied"], stage, "blocks", BLOCKS_STEPS, 4, lrs, hides_images=True)
    result = outcome(f"hidden-{stage}")
    assert result.losses == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)
    seen = plain(models["untied"], stage, "blocks", BLOCKS_STEPS, 4, lrs)
    assert result.losses != pytest.approx(seen["losses"], rel=1e-3)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2-groups"])
def test_ragged_steps_do_not_hang(outcome: Outcomes, models: dict[str, str], name: str) -> None:
    check_ragged(outcome(f"{name}-ragged"), models["untied"], name.split("-")[0], RAGGED_STEPS)


@pytest.mark.slow
def test_many_ragged_steps_do_not_hang(
    models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path: Path
) -> None:
    cases = all_cases(models, deepspeed_configs)[2]
    ragged = [case | {"steps": MANY_RAGGED_STEPS} for case in cases if case["name"].endswith("-ragged")]
    with start_cases(2, ragged, tmp_path) as ranks:
        ranks.finish(timeout_s=900)
    for case in ragged:
        check_ragged(read_outcome(tmp_path, case["name"]), models["untied"], case["stage"], MANY_RAGGED_STEPS)


def check_ragged(result: Outcome, model: str, stage: str, steps: int) -> None:
    """Samples without image, helper image, latents or labels on either rank, and with several blocks. In stage
    1 they are packed, into more rows in some steps than in others; in stage 2 dealt by length."""
    case = worker.Case("", "", "", stage, steps, **RAGGED_CUTS[stage])
    ranks = [worker.steps_of(case, rank, 2) for rank in (0, 1)]
    first, second = (list(worker.samples_of(case, steps)) for steps in ranks)
    for has in ("image_mask", "latent_mask", "labels"):
        there = ([any((getattr(each, has) > 0).any() for each in own) for own in rank] for rank in (first, second))
        assert {(False, True), (True, False), (True, True)} <= set(zip(*there, strict=True)), has
    assert max(len(sample.latent_sizes) for own in first for sample in own) == 2
    num_micro_steps = {len(ranks[0].at(4 * step).micro_batches) for step in range(steps)}
    assert num_micro_steps == ({1, 2} if stage == "stage1" else {2})
    # The method's own rate: over many steps, rounding errors grow past the tolerance with a larger one.
    expected = plain(model, stage, "ragged", steps, 4, tuple(rates(steps, lr=1e-5, lr_decay="constant")))
    assert result.losses == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_deal_changes_no_loss(outcome: Outcomes, stage: str) -> None:
    """Only who computes which sample, and so the padding and how level the ranks are."""
    in_order, balanced = outcome(f"{stage}-in-order").records, outcome(f"{stage}-balanced").records
    assert [each["loss"] for each in balanced] == pytest.approx([each["loss"] for each in in_order], rel=1e-5)
    for name, least in (("imbalance", 1), ("padding_pct", 0)):
        ours, before = (sum(each[name] for each in records) / len(records) for records in (balanced, in_order))
        assert least < ours < before, name


def test_a_trained_tower(outcome: Outcomes, models: dict[str, str]) -> None:
    """Ranks without an image run the tower on a dummy; the gradients are those of the plain loop."""
    expected = plain(models["untied"], "stage1", "ragged", 5, 2, tuple(rates(5)), train_tower=True)
    result = outcome("tower")
    assert result.losses == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)


def test_without_activation_checkpointing(outcome: Outcomes, models: dict[str, str]) -> None:
    expected = plain(models["untied"], "stage2", "fixed", 5, 4, tuple(rates(5)))
    assert outcome("stored").losses == pytest.approx(expected["losses"], rel=1e-4)


def test_bf16_stays_near_fp32(outcome: Outcomes, models: dict[str, str]) -> None:
    """bf16 has 8 significant bits: losses agree within 2%. With float32 masters, small updates are not lost."""
    expected = plain(models["untied"], "stage2", "fixed", 5, 4, tuple(rates(5)))
    assert outcome("bf16").losses == pytest.approx(expected["losses"], rel=2e-2)


def test_gradients_that_are_reduced_in_bf16(outcome: Outcomes, models: dict[str, str]) -> None:
    """A setting of the DeepSpeed JSON, off by default: half the traffic, gradients rounded to 8 significant bits."""
    expected = plain(models["untied"], "stage1", "fixed", 5, 4, tuple(rates(5)))
    result = outcome("bf16-communication")
    assert result.losses == pytest.approx(expected["losses"], rel=2e-4)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-3)
    # Rounded all the same: in float32 these losses deviate by about 5e-7.
    assert result.losses[1:] != pytest.approx(expected["losses"][1:], rel=5e-6)


@pytest.mark.parametrize("name", ["tower", "stored", "bf16", "layer-K4"])
def test_a_dry_run_leaves_no_trace(outcome: Outcomes, name: str) -> None:
    """Every loss, gradient norm and trained weight is that of the run without one, to the bit."""
    without, rehearsed = outcome(name), outcome(f"rehearsed-{name}")
    for field in ("loss_hex", "grad_norm", "lr", "position", "step"):
        assert [record[field] for record in rehearsed.records] == [record[field] for record in without.records], field
    assert rehearsed.report["final_param_norm"] == without.report["final_param_norm"]
    assert rehearsed.report["left_by_dry_run"] == {}


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam, about a minute
def test_offload(models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path: Path) -> None:
    """zero3_offload.json, parameters and DeepSpeedCPUAdam's states on the host: the losses of the plain loop."""
    shape = {"steps": 5, "accumulation": 2, "latent_sizes": FIXED}
    case = {"name": "offload", "stage": "stage2", "model": models["untied"], **shape}
    with start_cases(2, [case | {"deepspeed_config": deepspeed_configs["offload"]}], tmp_path) as ranks:
        ranks.finish(timeout_s=1200)
    expected = plain(models["untied"], "stage2", "fixed", 5, 4, tuple(rates(5)))
    assert read_outcome(tmp_path, "offload").losses == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("sizes", GATHER_SIZES)
def test_what_is_gathered(outcome: Outcomes, sizes: str) -> None:
    """In stage 2 a rollout is gathered less than twice per micro-step for any K, and so is a single group; groups as
    often as the planner says. The losses and gradients are the same."""
    found = {gather: outcome(f"{gather}-{sizes}") for gather in GATHERS}
    rollout = found["rollout"]
    worst = {name: max(each.report["gathered_bytes"]) / each.report["model_bytes"] for name, each in found.items()}
    print(f"gathered per micro-step, in models: {worst}")
    assert worst["rollout"] <= 2.0
    assert worst["one-group"] <= 2.0
    for name in ("layer", "groups", "one-group"):
        assert found[name].losses == pytest.approx(rollout.losses, rel=1e-5)
        norms = [[record["grad_norm"] for record in each.records] for each in (found[name], rollout)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        planned = planned_models(found[name].report["model"], GATHERS[name], worst_latents(sizes))
        assert worst[name] == pytest.approx(planned, rel=0.01), name


def worst_latents(sizes: str) -> int:
    """Of the largest step of a case with one block per row: both ranks make as many passes."""
    return max(max(step) for step in GATHER_SIZES[sizes])


def planned_models(path: str, gather: dict[str, Any], latents: int) -> float:
    """What the planner expects a micro-step to gather, in models."""
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": path} | gather,
            "data": {"shards": "unused"},
            "train": {"stage": "stage2", "max_steps": 1, "micro_batch_size_per_gpu": 1, "warmup_steps": 0},
        }
    )
    sizes = model_sizes(config.model)
    return gathered_elements(sizes, config, latents) / sum(sizes.all)


def test_the_shipped_limits_gather_the_rollout_once_and_while_the_tower_runs(outcome: Outcomes) -> None:
    """It stays from forward to backward. In the first step DeepSpeed records what follows what, and cannot prefetch."""
    found = outcome("shipped-limits")
    first, *later = [size / found.report["model_bytes"] for size in found.report["gathered_bytes"]]
    assert first >= 1
    assert later == [pytest.approx(1.0, abs=0.02)] * len(later)
    first, *later = found.report["under_way_after_tower"]
    assert first == 0
    assert later == [1.0] * len(later)
    # Of more steps, so that from the third on the learning rate was another.
    assert found.losses[:2] == pytest.approx(outcome("rollout-alternating").losses[:2], rel=1e-5)


@pytest.mark.parametrize("stage", ["text", "stage1"])
def test_few_fetches_in_one_pass(outcome: Outcomes, stage: str) -> None:
    """Each decoder layer is one unit for DeepSpeed's hooks, which otherwise run for every matrix of every layer."""
    assert max(outcome(f"{stage}-deep").report["fetches"]) <= 4 * DEEP_LAYERS


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_trace_of_the_reference(outcome: Outcomes, stage: str) -> None:
    """Our trainer reproduces 12 micro-batches and 6 updates of the reference's own trainer."""
    trace = golden_set.numbers("trace")[stage]
    result = outcome(f"{stage}-trace")
    accumulation, micro = trace["gradient_accumulation_steps"], trace["micro_losses"]
    check(f"{stage} trace: losses of micro-batches", result.report["micro_losses"], micro, 1e-3, "relative")
    means = [sum(micro[i : i + accumulation]) / accumulation for i in range(0, len(micro), accumulation)]
    check(f"{stage} trace: losses of steps", result.losses, means, 1e-3, "relative")
    grad_norms = [step["grad_norm"] for step in trace["steps"]]
    ours = [record["grad_norm"] for record in result.records]
    check(f"{stage} trace: gradient norms", ours, grad_norms, 1e-3, "relative")
    norms = result.report["final_param_norm"]
    for name, norm in trace["final_param_norm"].items():
        new_name = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        check(f"{stage} trace: norms of the trained parameters", norms[new_name], norm, 1e-3, "relative", name)
