"""The cases of the distributed tests, and how they are launched: see conftest.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_set
import launching
import worker

CUTS = {"2x1x2": (2, 1, 2), "1x2x2": (1, 2, 2), "1x4x1": (1, 4, 1)}
"""Ranks x micro-batch x accumulation: three ways to split the same global batch of 4."""
FIXED = [[4, 4, 4, 4]]
VARYING = [[4, 2, 3, 8], [1, 6, 2, 2], [5, 5, 5, 5]]
BLOCKS = [[[], [2], [8, 2], [2, 8, 2]], [[2], [2, 2], [], [8, 2]]]
"""K of each sample of a global batch, or of each of its blocks, step by step."""
BLOCKS_STEPS = len(BLOCKS) + 1  # more than those of the warm-up
HIDDEN_GATHERS = {"stage1": "layer", "stage2": "rollout"}
CUT_STEPS = 6  # two rounds of VARYING, over warm-up and decay
RAGGED_STEPS, MANY_RAGGED_STEPS = 20, 100
RAGGED_CUTS = {"stage1": {"accumulation": 2, "token_budget": 68}, "stage2": {"accumulation": 2, "balance": True}}
"""Of 4 samples: packed, and balanced."""
BALANCED_CUT = {"steps": 5, "micro_batch": 2, "accumulation": 2}
DEEP_LAYERS = 28  # those of the 7B
GATHERS: dict[str, dict[str, Any]] = {
    "rollout": {"gather": "rollout"},
    "layer": {"gather": "layer"},
    "groups": {"gather": "groups", "gather_layers": 2},
    "one-group": {"gather": "groups", "gather_layers": 100},
}
GATHER_SIZES = {"K2": [[2, 2]], "K4": [[4, 4]], "K8": [[8, 8]], "alternating": [[2, 8], [8, 8], [4, 2]]}


@dataclass
class Outcome:
    """What a case reported, and its metrics.jsonl."""

    report: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]


def all_cases(models: dict[str, str], configs: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """The cases by number of ranks."""
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(ranks: int, name: str, stage: str, *, model: str = "untied", config: str = "plain", **more: Any) -> None:
        cases[ranks].append(
            {"name": name, "stage": stage, "model": models[model], "deepspeed_config": configs[config], **more}
        )

    for cut, (ranks, micro_batch, accumulation) in CUTS.items():
        shape = {"micro_batch": micro_batch, "accumulation": accumulation, "steps": CUT_STEPS}
        for stage in ("text", "stage1", "stage2"):
            add(ranks, f"{stage}-fixed-untied-{cut}", stage, latent_sizes=FIXED, **shape)
            add(ranks, f"{stage}-varying-tied-{cut}", stage, model="tied", latent_sizes=VARYING, **shape)
    slow = {"lr": 1e-5, "lr_decay": "constant"}
    settings = {"train": slow, "model": GATHERS["groups"]}
    add(2, "stage2-groups-ragged", "stage2", steps=RAGGED_STEPS, settings=settings, **RAGGED_CUTS["stage2"])
    for stage in ("stage1", "stage2"):
        settings = {"train": slow}
        add(2, f"{stage}-ragged", stage, steps=RAGGED_STEPS, settings=settings, **RAGGED_CUTS[stage])
        for balance in (False, True):
            add(2, f"{stage}-{'balanced' if balance else 'in-order'}", stage, balance=balance, **BALANCED_CUT)
        trace = golden_set.numbers("trace")[stage]
        add(
            1,
            f"{stage}-trace",
            stage,
            steps=trace["total_steps"],
            accumulation=trace["gradient_accumulation_steps"],
            golden_order=trace["order"],
            settings={"train": trace_settings(trace)},
        )
    for name, sizes in GATHER_SIZES.items():
        for gather, model in GATHERS.items():
            settings = {"model": model, "train": {"warmup_steps": 1}}
            steps = 3 if name in ("K4", "alternating") else 2  # in the first, DeepSpeed records the order of modules
            add(2, f"{gather}-{name}", "stage2", config="logged", steps=steps, latent_sizes=sizes, settings=settings)
    for tied, gather in (("untied", "rollout"), ("tied", "layer")):
        for ranks in (1, 2):
            settings = {"model": {"gather": gather}, "train": slow}
            shape = {"micro_batch": 2, "accumulation": 2 // ranks, "steps": BLOCKS_STEPS, "latent_sizes": BLOCKS}
            add(ranks, f"blocks-{tied}-{ranks}", "stage2", model=tied, settings=settings, **shape)
    for stage, gather in HIDDEN_GATHERS.items():
        model = {"gather": gather, "answer_sees_image": False}
        shape = {"micro_batch": 2, "accumulation": 1, "steps": BLOCKS_STEPS, "latent_sizes": BLOCKS}
        add(2, f"hidden-{stage}", stage, settings={"model": model, "train": slow}, **shape)
    sizes = GATHER_SIZES["alternating"]
    add(
        2,
        "shipped-limits",
        "stage2",
        config="shipped",
        steps=4,
        latent_sizes=sizes,
        settings={"train": {"warmup_steps": 1}},
    )
    for stage in ("text", "stage1"):
        add(1, f"{stage}-deep", stage, model="deep", steps=2, accumulation=1, settings={"train": {"warmup_steps": 1}})
    add(2, "bf16-communication", "stage1", config="bf16-communication", steps=5, latent_sizes=FIXED, accumulation=2)
    for prefix, rehearsed in (("", False), ("rehearsed-", True)):
        more = {"steps": 5, "rehearsed": rehearsed}
        add(2, f"{prefix}tower", "stage1", settings={"model": {"train_tower": True}}, **more)
        two = more | {"accumulation": 2, "latent_sizes": FIXED}
        add(2, f"{prefix}stored", "stage2", settings={"model": {"activation_checkpointing": "none"}}, **two)
        add(2, f"{prefix}bf16", "stage2", settings={"train": {"dtype": "bf16"}}, **two)
    settings = {"model": {"gather": "layer"}, "train": {"warmup_steps": 1}}
    add(2, "rehearsed-layer-K4", "stage2", steps=3, latent_sizes=[[4, 4]], settings=settings, rehearsed=True)
    return cases


def trace_settings(trace: dict[str, Any]) -> dict[str, Any]:
    """The settings of the reference's training trace as our configuration."""
    return {
        "lr": trace["learning_rate"],
        "warmup_steps": trace["warmup_steps"],
        "warmup_from_zero": True,
        "weight_decay": trace["weight_decay"],
        "gradient_clipping": trace["max_grad_norm"],
        "betas": trace["betas"],
        "eps": trace["eps"],
    }


def read_outcome(folder: Path, name: str) -> Outcome:
    records = (folder / name / "metrics.jsonl").read_text().splitlines()
    return Outcome(json.loads((folder / f"{name}.json").read_text()), [json.loads(line) for line in records])


def start_cases(
    ranks: int, cases: list[dict[str, Any]], folder: Path, variables: dict[str, str] | None = None
) -> launching.Ranks:
    """Starts the worker on cases."""
    log = folder / f"{ranks}.log"
    return launching.start(ranks, cases, folder, main=worker.main, log=log, variables=variables)
