"""LoRA, and frozen parts, under ZeRO-3 on 2 ranks and on 1, against a plain loop over a model of plain peft.

Losses and gradient norms of every step, what every parameter has become, and that the base has not changed in any bit.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_loop
import pytest
import torch
from cases import BLOCKS, BLOCKS_STEPS, FIXED, VARYING, Outcome, read_outcome, start_cases
from random_samples import END, PAD, START, ragged_batch
from test_sharding import rates

LATENTS = [PAD, START, END]
SIZES = {"fixed": FIXED, "varying": VARYING, "blocks": BLOCKS}
# AdamW divides by the gradient's size: with the default, rounding errors of tiny gradients would become whole steps.
# With 1 instead, a change is about the learning rate times the gradient.
TRAIN = {"lr": 0.1, "eps": 1.0, "lr_decay": "constant"}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@dataclass
class Lora:
    """A case with an adapter: what our recipe says, and what plain peft is told."""

    stage: str
    kind: str
    model: str
    ranks: int
    lora: dict[str, Any]
    targets: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def embeddings(self) -> str:
        return self.lora.get("train_embeddings", "latent_rows")


LORA = {
    "text": Lora("text", "fixed", "untied", 2, {"target_modules": "attention", "train_embeddings": "none"}, ATTENTION),
    "grounded": Lora("stage1", "blocks", "untied", 2, {"alpha": 4}, ATTENTION + MLP),
    "grounded-tied": Lora("stage1", "varying", "tied", 1, {"train_embeddings": "all"}, ATTENTION + MLP),
    "recurrent": Lora("stage2", "blocks", "untied", 2, {"rank": 4, "alpha": 16}, ATTENTION + MLP),
    "recurrent-layer": Lora(
        "stage2", "varying", "tied", 2, {"target_modules": ["q_proj", "down_proj"]}, ["q_proj", "down_proj"],
        {"gather": "layer"},
    ),
    "recurrent-groups": Lora(
        "stage2",
        "blocks",
        "untied",
        2,
        {"rank": 4, "target_modules": "all"},
        ATTENTION + MLP,
        {"gather": "groups", "gather_layers": 1},
    ),
    "recurrent-stored": Lora(
        "stage2", "blocks", "tied", 1, {"target_modules": "mlp"}, MLP, {"activation_checkpointing": "none"}
    ),
    "recurrent-none": Lora(
        "stage2", "blocks", "untied", 2, {"train_embeddings": "none"}, ATTENTION + MLP
    ),
}  # fmt: skip
FREEZE = ["model.language_model.embed_tokens.*", "model.language_model.layers.0.*", "lm_head.*", "*norm.weight"]
FROZEN = {
    "merger": ("stage1", 2, {"train_merger": True, "freeze": FREEZE}),
    "merger-alone": ("stage2", 1, {"train_merger": True, "freeze": ["model.language_model.*", "lm_head.weight"]}),
    "layers": ("stage2", 2, {"freeze": FREEZE}),
}


def shape(kind: str, ranks: int) -> dict[str, Any]:
    return {"micro_batch": 2, "accumulation": 2 // ranks, "steps": BLOCKS_STEPS + 1, "latent_sizes": SIZES[kind]}


@pytest.fixture(scope="module")
def folder(models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs all cases, those of 2 ranks and those of 1 at the same time."""
    folder = tmp_path_factory.mktemp("lora")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, case in LORA.items():
        settings = {"model": {"lora": case.lora} | case.settings, "train": TRAIN}
        more = {"stage": case.stage, "model": models[case.model], "settings": settings} | shape(case.kind, case.ranks)
        cases[case.ranks].append({"name": name, **more})
    for name, (stage, ranks, model) in FROZEN.items():
        more = {"stage": stage, "model": models["untied"], "settings": {"model": model, "train": TRAIN}}
        cases[ranks].append({"name": name, **more, **shape("blocks", ranks)})
    with ExitStack() as stack:
        starts = []
        for ranks, some in cases.items():
            full = [each | {"deepspeed_config": deepspeed_configs["plain"], "keeps_weights": True} for each in some]
            starts.append(stack.enter_context(start_cases(ranks, full, folder)))
        for each in starts:
            each.finish(timeout_s=900)
    return folder


def plain(make: Any, stage: str, kind: str) -> dict[str, Any]:
    steps, sizes = BLOCKS_STEPS + 1, SIZES[kind]
    batches = [ragged_batch(step, 4, stage=stage, latent_sizes=sizes[step % len(sizes)]) for step in range(steps)]
    samples = [[vars(sample) for sample in batch] for batch in batches]
    weight = 0.1 if stage == "stage1" else 1.0
    lrs = rates(steps, lr=TRAIN["lr"], lr_decay="constant")
    return lora_loop.train(make, samples, stage, lrs=lrs, ce_loss_weight=weight, eps=TRAIN["eps"])


def compare_steps(result: Outcome, expected: dict[str, Any]) -> None:
    assert result.losses == pytest.approx(expected["losses"], rel=1e-5)
    assert [record["grad_norm"] for record in result.records] == pytest.approx(expected["grad_norms"], rel=1e-4)


def peft_settings(case: Lora) -> dict[str, Any]:
    """What plain peft is told, in words of its own."""
    rank = case.lora.get("rank", 16)
    settings: dict[str, Any] = {"r": rank, "lora_alpha": case.lora.get("alpha", 32)}
    settings["target_modules"] = rf".*language_model\.layers\..*\.({'|'.join(case.targets)})"
    heads = ["embed_tokens"] if case.model == "tied" else ["embed_tokens", "lm_head"]
    if case.embeddings == "latent_rows":
        settings["trainable_token_indices"] = dict.fromkeys(heads, LATENTS)
    return settings


@pytest.mark.parametrize("name", LORA)
def test_lora_is_that_of_a_plain_loop_with_peft(folder: Path, models: dict[str, str], name: str) -> None:
    case = LORA[name]

    def make() -> Any:
        model = lora_loop.with_adapter(models[case.model], **peft_settings(case))
        if case.embeddings == "all":
            model.get_input_embeddings().weight.requires_grad_(True)
            model.lm_head.weight.requires_grad_(True)
        return model

    expected = plain(make, case.stage, case.kind)
    compare_steps(read_outcome(folder, name), expected)

    found = {own_name(key): value for key, value in torch.load(folder / f"{name}.pt").items()}
    trained = {key: value for key, value in expected["changes"].items() if value.any()}
    assert {".lora_A", ".lora_B"} <= {part for key in trained for part in (".lora_A", ".lora_B") if part in key}
    assert any("tokens" in key for key in trained) == (case.embeddings != "none")
    for key, change in trained.items():
        largest = change.abs().max().item()
        torch.testing.assert_close(
            found[key] - expected["before"][key],
            change,
            rtol=0,
            atol=1e-4 * largest,
            msg=lambda text, key=key: f"{key}: {text}",
        )
    frozen = {key.replace(".base_layer", ""): value for key, value in found.items() if key not in trained}
    base = dict(lora_loop.load(models[case.model]).named_parameters())
    assert len(frozen) == len(base) - (case.embeddings == "all")  # tied there
    for key, value in frozen.items():
        assert torch.equal(value, base[key]), key


@pytest.mark.slow  # a start of its own, as DeepSpeed takes this setting once in a process
def test_second_shards_on_each_node(
    folder: Path, models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path: Path
) -> None:
    """`zero_hpz_partition_size`: after a step, frozen weights still have the shards of the node, and trained ones have
    not. Losses are those without it."""
    name = next(name for name, case in LORA.items() if case.settings.get("gather") == "groups" and case.ranks == 2)
    case = LORA[name]
    settings = {"model": {"lora": case.lora} | case.settings, "train": TRAIN}
    more = {"stage": case.stage, "model": models[case.model], "settings": settings} | shape(case.kind, case.ranks)
    with start_cases(2, [{"name": name, "deepspeed_config": deepspeed_configs["hpz"], **more}], tmp_path) as ranks:
        ranks.finish(timeout_s=600)
    assert read_outcome(tmp_path, name).losses == pytest.approx(read_outcome(folder, name).losses, rel=1e-5)


def own_name(key: str) -> str:
    """peft's name of a parameter, from ours."""
    if key.endswith(".rows"):
        return key.removesuffix("rows") + "token_adapter.trainable_tokens_delta.default"
    return key


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts_and_a_trained_merger(folder: Path, models: dict[str, str], name: str) -> None:
    stage, _, settings = FROZEN[name]
    patterns, merger = settings["freeze"], settings.get("train_merger", False)
    expected = plain(lambda: lora_loop.frozen(models["untied"], patterns, train_merger=merger), stage, "blocks")
    compare_steps(read_outcome(folder, name), expected)
    found = torch.load(folder / f"{name}.pt")
    changed = {key for key, value in found.items() if not torch.equal(value, expected["before"][key])}
    assert changed == {key for key, value in expected["changes"].items() if value.any()}
    assert any("merger" in key for key in changed) == merger
    assert not any("layers.0." in key or "norm.weight" in key for key in changed)
