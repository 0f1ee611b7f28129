"""One rank of the distributed tests: runs cases through the real engine and Trainer.

Each case trains a small model on random ragged samples; what it reports goes to FOLDER/NAME.json.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import golden_set
import torch
from dealt import by_length
from deepspeed.comm.comm import comms_logger
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from random_samples import END, PAD, START, ragged_batch, random_sample

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.packing import collate_packed
from mirage_ds.data.steps import Share, Steps
from mirage_ds.model.backbone import DTYPES, load_backbone
from mirage_ds.model.mirage import MirageModel, hf_name
from mirage_ds.model.trained import choose_trained
from mirage_ds.ops.latent_pool import describe_path
from mirage_ds.train_state import TrainState
from mirage_ds.training.dry_run import rehearse
from mirage_ds.training.early_end import EarlyEnd
from mirage_ds.training.metrics import Metrics
from mirage_ds.training.trainer import Trainer
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import (
    choose_gather,
    initialize,
    mark_gather_units,
    parameter_groups,
)


@dataclass
class Case:
    """What one case trains, and on what: see `samples`."""

    name: str
    model: str
    deepspeed_config: str
    stage: str
    steps: int
    micro_batch: int = 1
    accumulation: int = 1
    latent_sizes: list[list[Any]] | None = None
    golden_order: list[int] | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """More of the configuration, by section."""
    spoiled: list[list[int]] = field(default_factory=list)
    """[step, number in its global batch] of samples whose pixels are NaN."""
    balance: bool = False
    """Whether global batches are dealt by length."""
    token_budget: int | None = None
    """Of packed rows."""
    rehearsed: bool = False
    """Whether a dry run comes before the first step, of other and more samples."""

    keeps_weights: bool = False
    """Whether all weights at the end go to FOLDER/NAME.pt."""

    @property
    def hides_images(self) -> bool:
        return not self.settings.get("model", {}).get("answer_sees_image", True)

    def samples(self, step: int, size: int) -> list[EncodedSample]:
        """The global batch of a step: of the golden set in an order, or random ones with `latent_sizes[step % len]`
        (K of each sample or of its blocks), or completely ragged ones."""
        if self.golden_order:
            return [golden_set.encoded(i, self.stage) for i in self.golden_order[step * size : (step + 1) * size]]
        sizes = self.latent_sizes and self.latent_sizes[step % len(self.latent_sizes)]
        samples = ragged_batch(step, size, stage=self.stage, latent_sizes=sizes)
        for spoiled_step, number in self.spoiled:
            if spoiled_step == step:
                spoiled = random_sample(number, stage=self.stage)
                samples[number] = replace(spoiled, pixel_levels=torch.full((3, 256), float("nan")))
        return [replace(sample, hides_images=self.hides_images) for sample in samples]


def steps_of(case: Case, rank: int, world_size: int) -> Steps:
    """Which samples of a case a rank computes."""
    share = Share(rank, world_size, case.micro_batch, case.accumulation)
    samples = (each for step in range(case.steps) for each in case.samples(step, share.global_batch_size))
    return by_length(share, samples, balance=case.balance, token_budget=case.token_budget)


def samples_of(case: Case, steps: Steps) -> Iterator[list[EncodedSample]]:
    """This rank's micro-batches, as samples."""
    size = steps.share.global_batch_size
    for step in range(case.steps):
        samples = case.samples(step, size)
        for positions in steps.at(step * size).micro_batches:
            yield [samples[position - step * size] for position in positions]


def batches(case: Case, steps: Steps) -> Iterator[Batch]:
    align = partial(collate, align_latents=case.stage == "stage2")
    for samples in samples_of(case, steps):
        yield collate_packed(samples) if case.token_budget else align(samples)


def run(case: Case, folder: Path, device: torch.device) -> dict[str, Any]:
    config = Config.model_validate(
        {
            "run": {"dir": folder / case.name},
            "model": {"path": case.model} | case.settings.get("model", {}),
            "data": {"shards": "unused"},
            "train": {
                "stage": case.stage,
                "max_steps": case.steps,
                "micro_batch_size_per_gpu": case.micro_batch,
                "gradient_accumulation_steps": case.accumulation,
                "dtype": "fp32",
                "lr": 1e-3,
                "warmup_steps": 2,
            }
            | case.settings.get("train", {}),
            "distributed": {"deepspeed_config": case.deepspeed_config},
        }
    )
    config.run.dir.mkdir(parents=True, exist_ok=True)
    deepspeed_config = resolve_deepspeed_config(config)
    backbone = load_backbone(
        case.model,
        dtype=DTYPES[config.train.dtype],
        deepspeed_config=deepspeed_config,
    )
    choose_trained(backbone, config.model, [PAD, START, END], config.run.seed)
    model = MirageModel(
        backbone,
        stage=case.stage,
        ce_loss_weight=config.train.text_weight,
        recompute=config.model.activation_checkpointing == "full",
        train_tower=config.model.trains_vision,
    )
    micro_losses: list[float] = []
    model.register_forward_hook(lambda module, inputs, losses: micro_losses.append(losses.loss.item()))
    gather = choose_gather(config)
    mark_gather_units(model, config)
    engine = initialize(model, parameter_groups(model, config.train.weight_decay), config.train, deepspeed_config)
    size = config.train.samples_per_step(distributed.world_size())
    metrics = Metrics(
        config.run.dir, stage=case.stage, global_batch_size=size, max_steps=case.steps, log_freq=case.steps
    )
    gathered: list[int] = []
    fetches: list[int] = []
    early: list[float] = []
    model.tower.register_forward_hook(lambda *_: early.append(share_under_way(model.rollout)))
    steps = steps_of(case, distributed.rank(), distributed.world_size())
    trainer = Trainer(
        engine,
        batches(case, steps),
        steps,
        config.train,
        metrics,
        TrainState(),
        max_steps=case.steps,
        device=device,
        agree_on_passes=gather != "rollout" and config.several_passes,
        early_end=EarlyEnd(end_s=None, margin_s=0),
    )
    left = rehearse_case(case, trainer) if case.rehearsed else {}
    take_gathered_bytes()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        model_bytes = take_gathered_bytes()
    take_fetches()
    trainer.train(
        after_step=[
            lambda state: gathered.append(take_gathered_bytes()),
            lambda state: fetches.append(take_fetches()),
        ]
    )
    metrics.close()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        norms = {name: parameter.norm().item() for name, parameter in backbone.hf.named_parameters()}
        weights = {hf_name(name): weight.detach().clone() for name, weight in model.named_parameters()}
        if case.keeps_weights and distributed.is_main():
            torch.save(weights, folder / f"{case.name}.pt")
    engine.destroy()
    return {
        "pooling": describe_path(device),
        "gathered_bytes": gathered,
        "model_bytes": model_bytes,
        "fetches": fetches,
        "under_way_after_tower": early,
        "micro_losses": micro_losses,
        "final_param_norm": norms,
        "left_by_dry_run": left,
    }


def rehearse_case(case: Case, trainer: Trainer) -> dict[str, Any]:
    """A dry run of ragged rows, by a model that draws random numbers; what it changed of what a run reads and saves."""

    def state() -> dict[str, Any]:
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        counters = {name: getattr(trainer.engine, name) for name in names}
        return counters | asdict(trainer.state) | {"random": torch.get_rng_state().tolist()}

    before = state()
    batch = collate(ragged_batch(7, 4, stage=case.stage), align_latents=case.stage == "stage2")

    def draw(*_: object) -> None:
        torch.rand(1)

    hook = trainer.engine.module.register_forward_hook(draw)
    rehearse(trainer, batch)
    hook.remove()
    return {name: value for name, value in state().items() if value != before[name]}


def take_gathered_bytes() -> int:
    """Bytes of weights that ZeRO-3 has gathered on this rank since the last call, from DeepSpeed's own log."""
    log = comms_logger.get_raw_data()
    total = sum(
        size * entry[0]
        for name, sizes in log.items()
        if "all_gather" in name or "allgather" in name
        for size, entry in sizes.items()
    )
    comms_logger.reset_data()
    return total


fetch_count = 0
fetch = PartitionedParameterCoordinator.fetch_sub_module


def counted_fetch(*arguments: Any, **keywords: Any) -> None:
    """Counts how often DeepSpeed's hooks ask for the weights of a module."""
    global fetch_count
    fetch_count += 1
    fetch(*arguments, **keywords)


def take_fetches() -> int:
    """The number of fetches since the last call."""
    global fetch_count
    count, fetch_count = fetch_count, 0
    return count


def share_under_way(module: torch.nn.Module) -> float:
    """The share of a module's weights whose gather has begun, and that nothing has waited for yet."""
    weights = list(module.parameters())
    begun = [weight for weight in weights if weight.ds_status == ZeroParamStatus.INFLIGHT]
    return sum(weight.ds_numel for weight in begun) / sum(weight.ds_numel for weight in weights)


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    device = distributed.init(timeout_s=300)
    PartitionedParameterCoordinator.fetch_sub_module = counted_fetch
    for settings in cases:
        case = Case(**settings)
        report = run(case, folder, device)
        if distributed.is_main():
            (folder / f"{case.name}.json").write_text(json.dumps(asdict(case) | report))
    distributed.shut_down()
