"""The settings with which a run fits on some GPUs, the fastest by the estimate first: `mirage-launch plan --advise`.

All combinations of what changes memory and time, but not what is computed: how much ZeRO-3 gathers, the micro-batch,
what is recomputed, what is offloaded. LoRA, which trains something else, is a list of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from rich import box
from rich.table import Table

from launch.planner.estimate import Estimate, estimate, measure
from mirage_ds.config import Config
from mirage_ds.config_lora import Lora
from mirage_ds.sizing.micro_batch import with_micro_batch
from mirage_ds.zero3.engine import GIB

SHIPPED, OFFLOAD = "zero3.json", "zero3_offload.json"
GROUP_LAYERS = (8, 4, 1)  # of equal ways the one with the fewest gathers comes first
SHOWN = 5


@dataclass(frozen=True)
class Way:
    """One way to run the recipe."""

    settings: tuple[str, ...]
    """As words of a command line, but for the micro-batch."""
    found: Estimate

    @property
    def step_s(self) -> float | None:
        """Seconds of a step; None with offload, where it depends on the host."""
        return self.found.time.step_s if self.found.time else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """All settings, to paste behind the recipe."""
        if self.found.packed:
            return self.settings
        cut = {
            "micro_batch_size_per_gpu": self.found.micro_batch_size,
            "global_batch_size": self.found.samples_per_step,
        }
        return self.settings + _words("train", **cut, gradient_accumulation_steps="null")


def advise(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    mem_bytes: float | None = None,
    settings: tuple[str, ...] = (),
) -> list[Way]:
    """All ways to run this recipe on these GPUs, those that fit first.

    Of these, those with a time come in its order, of equal ones that with less memory; those without come after them,
    in the order of their memory.

    Args:
        mem_bytes: host memory of a node; None: not checked.
        settings: what makes the recipe this run, as words of a command line.

    Raises:
        ConfigError, DataError: see `estimate`.
    """
    measured = measure(config)
    world_size = nodes * gpus_per_node

    def best(run: Config) -> Estimate:
        """With the micro-batch that has the best time; without a time, with the largest that fits."""
        found = estimate(run, nodes, gpus_per_node, gpu, mem_bytes, measured)
        if found.fastest is None:
            return found
        cut = with_micro_batch(run, found.fastest[0], world_size)
        return estimate(cut, nodes, gpus_per_node, gpu, mem_bytes, measured)

    ways = [Way(settings + words, best(changed)) for words, changed in variants(config, world_size)]

    def rank(way: Way) -> tuple[bool, bool, float, int]:
        return not way.found.fits, way.step_s is None, round(way.step_s or 0, 3), way.found.memory.peak

    return sorted(ways, key=rank)


def variants(config: Config, world_size: int) -> Iterator[tuple[tuple[str, ...], Config]]:
    """The run in all combinations, each with the words that make it so."""
    gathers: list[dict[str, Any]] = [{"gather": "layer"}]
    if config.several_passes:
        gathers = [{"gather": "rollout"}, *({"gather": "groups", "gather_layers": layers} for layers in GROUP_LAYERS)]
    own = config.distributed.deepspeed_config
    train: dict[str, Any] = {}
    if not config.data.packing:
        batch = config.train.samples_per_step(world_size)
        train = {"micro_batch_size_per_gpu": "auto", "global_batch_size": batch, "gradient_accumulation_steps": None}
    for gather, recompute, file in product(gathers, ("full", "none"), (own, OFFLOAD) if own == SHIPPED else (own,)):
        model = gather | {"activation_checkpointing": recompute}
        settings = _words("model", **model) + (() if file == own else _words("distributed", deepspeed_config=file))
        yield settings, _changed(config, model=model, train=train, distributed={"deepspeed_config": file})


def with_lora(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The same run, but what is trained is an adapter with the defaults; and the words that make it so."""
    lora = Lora()
    others: dict[str, Any] = {"train_tower": False, "train_merger": False, "freeze": ()}
    unset = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in others.items()
        if getattr(config.model, key) != value
    }
    words = _words("model.lora", rank=lora.rank) + _words("model", **unset)
    return _changed(config, model={"lora": lora, **others}), words


def advice(ways: list[Way], what: str) -> tuple[Table | None, str]:
    """A table of the best ways, and a line: the best one to paste, or that none fits, and what comes nearest."""
    fitting = [way for way in ways if way.found.fits]
    if not fitting:
        # Where the GPUs' memory is enough for some, the host's is not.
        on_gpus = [way.found for way in ways if way.found.memory.peak <= way.found.limit_bytes]
        if on_gpus:
            least = min(on_gpus, key=lambda found: found.host_bytes)
        else:
            least = min((way.found for way in ways), key=lambda found: found.memory.peak)
        return None, f"{what}: no setting fits; the one with the least memory {least.verdict.partition('; use')[0]}"
    shown = Table(box=box.MARKDOWN)
    shown.add_column(f"{what}, {fitting[0].found.nodes} x {fitting[0].found.gpus_per_node} {fitting[0].found.gpu}")
    for name in ("micro-batch", "GiB per GPU", "GiB of host memory per node", "s per step (assumed rates)"):
        shown.add_column(name, justify="right")
    for way in fitting[:SHOWN]:
        seconds = "-" if way.step_s is None else f"{way.step_s:.2f}"
        sizes = (f"{size / GIB:.1f}" for size in (way.found.memory.peak, way.found.host_bytes))
        shown.add_row(" ".join(way.settings), str(way.found.micro_batch_size), *sizes, seconds)
    return shown, f"{what}, the first of {len(fitting)} that fit: {' '.join(fitting[0].overrides)}"


def _words(section: str, **values: Any) -> tuple[str, ...]:
    """What to write on a command line."""
    return tuple(f"{section}.{key}={value}" for key, value in values.items())


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values in some sections."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )
