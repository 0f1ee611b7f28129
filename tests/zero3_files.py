"""Writes a run folder with a checkpoint in ZeRO-3's layout from full weights: any number of ranks, none started.

test_partitions.py checks the layout with DeepSpeed's own zero_to_fp32; tests/distributed has real checkpoints.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from mirage_ds.config import Config
from mirage_ds.model.mirage import HF_NAMES


def write_run(
    run_dir: Path,
    model: Path | str,
    weights: Mapping[str, torch.Tensor],
    *,
    ranks: int = 2,
    sub_group_numel: int = 10**9,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes checkpoints/global_step3, complete, and `latest`; returns the checkpoint.

    Args:
        weights: float32, by transformers' names, a tied head once; the tower's are frozen unless model.train_tower.
        sub_group_numel: a rank's elements after which DeepSpeed starts another sub-group.
        settings: more of the configuration, by section.
    """
    settings = settings or {}
    config = Config.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"path": str(model)} | settings.get("model", {}),
            "data": {"shards": "unused"} | settings.get("data", {}),
            "train": {"stage": "stage2", "max_steps": 20, "dtype": "fp32"} | settings.get("train", {}),
        }
    )
    checkpoint = run_dir / "checkpoints" / "global_step3"
    checkpoint.mkdir(parents=True)
    own = {own_name(name): weight for name, weight in weights.items()}
    frozen = {} if config.model.train_tower else {k: v for k, v in own.items() if k.startswith("tower.")}
    trained = {name: weight for name, weight in own.items() if name not in frozen}
    groups = [
        {name: weight for name, weight in trained.items() if weight.dim() > 1},
        {name: weight for name, weight in trained.items() if weight.dim() == 1},
    ]
    for rank in range(ranks):
        write_rank(checkpoint, rank, ranks, groups, frozen, sub_group_numel, bf16=config.train.dtype == "bf16")
    facts = {"step": 3, "position": 12, "world_size": ranks, "config": config.model_dump(mode="json")}
    (checkpoint / "run.json").write_text(json.dumps(facts))
    complete_by_hand(checkpoint)
    return checkpoint


def complete_by_hand(checkpoint: Path) -> None:
    """Writes files.json of the existing files, and `latest`."""
    listing = {}
    for file in checkpoint.iterdir():
        if file.name != "files.json":
            content = file.read_bytes()
            listing[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "files.json").write_text(json.dumps(listing))
    (checkpoint.parent / "latest").write_text(checkpoint.name)


def own_name(hf_name: str) -> str:
    """MirageModel's name of a parameter."""
    own, theirs = next((own, theirs) for own, theirs in HF_NAMES.items() if hf_name.startswith(theirs))
    return own + hf_name.removeprefix(theirs)


def partition(weight: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """This rank's elements, padded."""
    size = -(-weight.numel() // ranks)
    padded = torch.full((size * ranks,), -1e30)
    padded[: weight.numel()] = weight.flatten()
    return padded[rank * size : (rank + 1) * size].clone()


def write_rank(
    checkpoint: Path,
    rank: int,
    ranks: int,
    groups: list[dict[str, torch.Tensor]],
    frozen: dict[str, torch.Tensor],
    sub_group_numel: int,
    *,
    bf16: bool,
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    model_states = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: weight.shape for name, weight in group.items()} for group in groups],
        "frozen_param_shapes": {name: weight.shape for name, weight in frozen.items()},
        "frozen_param_fragments": {name: partition(weight, rank, ranks).to(dtype) for name, weight in frozen.items()},
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    stem = f"zero_pp_rank_{rank}_mp_rank_00"
    torch.save(model_states, checkpoint / f"{stem}_model_states.pt")
    sub_groups: list[list[torch.Tensor]] = []
    for group in groups:
        full = True
        for weight in group.values():
            if full:
                sub_groups.append([])
            sub_groups[-1].append(partition(weight, rank, ranks))
            full = sum(part.numel() for part in sub_groups[-1]) >= sub_group_numel
    optimizer = {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(1.0),
        "partition_count": ranks,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(7)}}},
        "fp32_flat_groups": [torch.cat(parts).requires_grad_() for parts in sub_groups],
    }
    name = f"{'bf16_' if bf16 else ''}{stem}_optim_states.pt"
    torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, checkpoint / name)
