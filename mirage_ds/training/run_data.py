"""A run's data on one rank: which samples it computes, and the stream of its micro-batches."""

from collections.abc import Iterator
from functools import partial

from mirage_ds.batch import Batch
from mirage_ds.config import Config
from mirage_ds.data.collate import collate
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.image_dropout import drops_image
from mirage_ds.data.mixture import order_of
from mirage_ds.data.packing import collate_packed
from mirage_ds.data.steps import Share, Steps
from mirage_ds.data.stream import FoldersReader, make_loader
from mirage_ds.data.target_cache import TargetCaches
from mirage_ds.training.start import Start
from mirage_ds.zero3 import distributed


def deal_steps(config: Config, start: Start, position: int) -> Steps:
    """Which samples this rank computes in which micro-step, from a position on."""
    share = Share(
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=config.train.accumulation_steps(distributed.world_size()),
        start=position,
    )
    plan = order_of(config, start.shards)
    return Steps(plan, start.costs, share, balance=config.data.balance, token_budget=config.data.token_budget)


def open_stream(config: Config, start: Start, steps: Steps, targets: TargetCaches | None) -> Iterator[Batch]:
    """The micro-batches of these steps, without end."""
    share = config.data.text_dropout_image
    loader = make_loader(
        FoldersReader(start.shards, targets, Helpers.of(config)),
        start.encoder,
        collate_packed if config.data.packing else partial(collate, align_latents=config.train.stage == "stage2"),
        steps,
        num_workers=config.data.num_workers,
        pin_memory=start.device.type == "cuda",
        on_fault=config.data.on_fault,
        # Sooner than the other ranks' collectives, so that they still answer, and the run can save.
        timeout_s=max(1, config.distributed.timeout_s * 4 // 5),
        drops_image=partial(drops_image, config.run.seed, share) if share else None,
    )
    return iter(loader)
