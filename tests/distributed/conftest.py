"""All cases of the distributed tests run in two launches: one of 2 ranks, one of 1 rank, at the same time.

A launch costs 15 s of imports, a case seconds; so the cases stand here, and the tests read what came out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_set
import launching
import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

HERE = Path(__file__).parent
CUTS = {"2x1x2": (2, 1, 2), "1x2x2": (1, 2, 2), "1x4x1": (1, 4, 1)}
"""Ranks x micro-batch x accumulation: three ways to cut the same global batch of 4."""
FIXED = [[4, 4, 4, 4]]
VARYING = [[4, 2, 3, 8], [1, 6, 2, 2], [5, 5, 5, 5]]
"""K of each sample of a global batch, step by step."""
GATHER_SIZES = {"K2": [[2, 2]], "K4": [[4, 4]], "K8": [[8, 8]], "alternating": [[2, 8], [8, 8], [4, 2]]}


@dataclass
class Outcome:
    """What a case reported, and its metrics.jsonl."""

    report: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The golden set's model, and one of the same shape with tied embeddings."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    config = AutoConfig.from_pretrained(golden_set.MODEL, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return {"untied": golden_set.MODEL, "tied": str(folder)}


@pytest.fixture(scope="session")
def deepspeed_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """ds_configs/zero3.json made small enough that a small model is really sharded, gathered and prefetched.

    In `logged` nothing lives on from one use to the next, as in a model far larger than the live-parameter limits, and
    DeepSpeed logs what it communicates.
    """
    folder = tmp_path_factory.mktemp("ds_configs")
    shipped = json.loads((HERE.parents[1] / "ds_configs" / "zero3.json").read_text())
    small = {
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_param_persistence_threshold": 0,
    }
    nothing_lives_on = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    kinds = {
        "plain": shipped | {"zero_optimization": shipped["zero_optimization"] | small},
        "logged": shipped
        | {
            "zero_optimization": shipped["zero_optimization"] | small | nothing_lives_on,
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
        },
    }
    for name, content in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in kinds}


def all_cases(models: dict[str, str], configs: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """The cases by number of ranks."""
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(ranks: int, name: str, stage: str, *, model: str = "untied", config: str = "plain", **more: Any) -> None:
        cases[ranks].append(
            {"name": name, "stage": stage, "model": models[model], "deepspeed_config": configs[config], **more}
        )

    for cut, (ranks, micro_batch, accumulation) in CUTS.items():
        shape = {"micro_batch": micro_batch, "accumulation": accumulation}
        for stage in ("text", "stage1", "stage2"):
            add(ranks, f"{stage}-fixed-untied-{cut}", stage, latent_sizes=FIXED, **shape)
            add(ranks, f"{stage}-varying-tied-{cut}", stage, model="tied", latent_sizes=VARYING, **shape)
    slow = {"lr": 1e-5, "lr_decay": "constant"}
    for stage in ("stage1", "stage2"):
        add(2, f"{stage}-ragged", stage, steps=100, settings={"train": slow})
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
        for gather in ("rollout", "layer"):
            settings = {"model": {"gather": gather}}
            add(2, f"{gather}-{name}", "stage2", config="logged", steps=3, latent_sizes=sizes, settings=settings)
    add(2, "tower", "stage1", steps=5, settings={"model": {"train_tower": True}})
    add(
        2,
        "stored",
        "stage2",
        steps=5,
        accumulation=2,
        latent_sizes=FIXED,
        settings={"model": {"activation_checkpointing": "none"}},
    )
    add(2, "bf16", "stage2", steps=5, accumulation=2, latent_sizes=FIXED, settings={"train": {"dtype": "bf16"}})
    return cases


def trace_settings(trace: dict[str, Any]) -> dict[str, Any]:
    """The reference's training trace in our configuration's words."""
    return {
        "lr": trace["learning_rate"],
        "warmup_steps": trace["warmup_steps"],
        "warmup_from_zero": True,
        "weight_decay": trace["weight_decay"],
        "gradient_clipping": trace["max_grad_norm"],
        "betas": trace["betas"],
        "eps": trace["eps"],
    }


@pytest.fixture(scope="session")
def outcome(
    models: dict[str, str], deepspeed_configs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """Runs every case once, and gives the outcome of each by name."""
    folder = tmp_path_factory.mktemp("cases")
    launches = []
    for ranks, cases in all_cases(models, deepspeed_configs).items():
        listing, log = folder / f"{ranks}.ranks", folder / f"{ranks}.log"
        listing.write_text(json.dumps(cases))
        launches.append((launching.start(ranks, str(HERE / "worker.py"), str(listing), str(folder), log=log), log))
    for process, log in launches:
        launching.finish(process, log, timeout_s=800)

    def read(name: str) -> Outcome:
        records = (folder / name / "metrics.jsonl").read_text().splitlines()
        return Outcome(json.loads((folder / f"{name}.json").read_text()), [json.loads(line) for line in records])

    return read
