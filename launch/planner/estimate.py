"""Estimates a run on a number of GPUs: memory, traffic, time, disk; whether it fits, and what to change if not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from launch.planner.level import FolderCosts, Level, folder_costs, without_shards
from launch.planner.time_estimate import StepTime, Traffic, step_time, traffic
from mirage_ds.checkpoint.save import ADAM_BYTES
from mirage_ds.config import Config
from mirage_ds.errors import ConfigError
from mirage_ds.model.backbone import DTYPES
from mirage_ds.sizing.gpus import USABLE, find_gpu
from mirage_ds.sizing.host_memory import offload_bytes
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import Memory, estimate_memory, offloads
from mirage_ds.sizing.micro_batch import candidates, choose, setting_of, with_micro_batch
from mirage_ds.sizing.model_sizes import ModelSizes, model_sizes
from mirage_ds.sizing.savings import savings
from mirage_ds.sizing.workload import Row, Workload
from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config
from mirage_ds.zero3.engine import GIB, choose_gather

MAX_NODES = 64  # that advice may suggest


@dataclass(frozen=True)
class Estimate:
    """Everything that `mirage-launch plan` shows about a recipe on one number of nodes."""

    config: Config
    """Of the recipe, with a number as micro-batch."""
    nodes: int
    gpus_per_node: int
    gpu: str
    sizes: ModelSizes
    rows: Workload
    memory: Memory
    limit_bytes: int
    """GPU memory available to a run."""
    offload_bytes: int
    """Host memory per node for what is offloaded; 0 without offload."""
    traffic: Traffic
    time: StepTime | None
    """None with offload, where it depends on the host."""
    level: Level
    """Of the ranks, by the deal; without shards they are level, and no row is padded."""
    samples_per_step: int
    micro_batch_size: int
    """The recipe's, or what `auto` takes."""
    packed: bool
    """Whether rows are packed."""
    fastest: tuple[int, float] | None
    """The micro-batch with the best time of those that fit, the smallest of equal ones, and its seconds per step. None:
    none fits, no time is estimated, or rows are packed, where `data.token_budget` decides."""
    checkpoint_bytes: int
    host_copy_bytes: int
    """Host memory of a node for the copy of its ranks' checkpoints; 0 if training waits while they are written."""
    mem_bytes: float | None
    """Host memory of a node; None: not known, and not checked."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit_bytes and self.fits_host

    @property
    def host_bytes(self) -> int:
        """Host memory of a node: what is offloaded, and the copy of checkpoints."""
        return self.offload_bytes + self.host_copy_bytes

    @property
    def fits_host(self) -> bool:
        return self.mem_bytes is None or self.host_bytes <= USABLE * self.mem_bytes

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """Changes, each of which makes the run fit into the GPUs' memory; empty if it does."""
        return () if self.memory.peak <= self.limit_bytes else find_advice(self)

    @property
    def samples_per_day(self) -> float | None:
        """None if no time is estimated."""
        return 86400 / self.time.step_s * self.samples_per_step if self.time else None

    @property
    def epochs_per_day(self) -> float | None:
        """None if the number of samples or the time is unknown."""
        if self.samples_per_day is None or self.rows.num_samples is None:
            return None
        return self.samples_per_day / self.rows.num_samples

    @property
    def verdict(self) -> str:
        """One line."""
        found = (
            f"needs {self.memory.peak / GIB:.1f} GiB per GPU; {self.limit_bytes / GIB:.1f} GiB available "
            f"({self.nodes} x {self.gpus_per_node} {self.gpu})"
        )
        if self.fits:
            return f"fits: {found}"
        if not self.fits_host:
            return f"does not fit: {self.lack_of_host_memory}"
        return f"does not fit: {found}; use {', or '.join(self.advice)}; --advise shows all settings that fit"

    @property
    def lack_of_host_memory(self) -> str:
        """What a node lacks, and what to do."""
        usable = USABLE * (self.mem_bytes or 0) / GIB
        parts = [f"{self.offload_bytes / GIB:.1f} for what is offloaded"] if self.offload_bytes else []
        parts += [f"{self.host_copy_bytes / GIB:.1f} for the copy of a checkpoint"] if self.host_copy_bytes else []
        remedies = ["more nodes", *(["checkpoint.mode=blocking"] if self.host_copy_bytes else [])]
        remedies += ["distributed.deepspeed_config=zero3.json"] if self.offload_bytes else []
        return (
            f"needs {self.host_bytes / GIB:.1f} GiB of host memory per node ({', '.join(parts)}); {usable:.1f} GiB "
            f"available, {USABLE:.0%} of a node's ({self.nodes} x {self.gpus_per_node} {self.gpu}); use "
            f"{', or '.join(remedies)}"
        )


@dataclass(frozen=True)
class Measured:
    """What an estimate rests on, whatever the settings of memory and time."""

    sizes: ModelSizes
    rows: Workload
    costs: FolderCosts | None


def measure(config: Config) -> Measured:
    """Looks at the model's sizes and the shards' rows.

    Raises:
        ConfigError: the model is unknown.
        DataError: the shards' manifest or index is damaged.
    """
    return Measured(model_sizes(config.model), workload(config), folder_costs(config))


def estimate(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    mem_bytes: float | None = None,
    measured: Measured | None = None,
) -> Estimate:
    """Estimates a run. Needs neither the shards nor, for a published model, its folder.

    Args:
        mem_bytes: host memory of a node; None: not checked.
        measured: of this run; None: is measured.

    Raises:
        ConfigError: the GPU or the model is unknown, the batch does not divide, packed rows would have one sample
            each, or the DeepSpeed JSON is invalid.
        DataError: the shards' manifest or index is damaged.
    """
    card = find_gpu(gpu)
    world_size = nodes * gpus_per_node
    samples_per_step = config.train.samples_per_step(world_size)
    config.check_packing(world_size)
    deepspeed_config = resolve_deepspeed_config(config)
    measured = measured or measure(config)
    sizes, rows, costs = measured.sizes, measured.rows, measured.costs
    offloaded_bytes, copied_bytes = host_needs(sizes, config, nodes, gpus_per_node)
    limit_bytes = int(card.memory_bytes * USABLE)
    if config.train.micro_batch_size_per_gpu == "auto":
        choice = choose(sizes, config, deepspeed_config, rows, world_size, limit_bytes)
        config = with_micro_batch(config, choice.size, world_size)

    def memory_of(run: Config) -> Memory:
        largest = rows.largest_of(run.rows_per_micro_batch)
        return estimate_memory(sizes, run, deepspeed_config, largest, world_size)

    def row_of(run: Config) -> Row:
        """Ranks that gather inside the passes make the same ones: as if all their rows were one micro-batch."""
        alike = choose_gather(run) != "rollout"
        return rows.mean_of(run.train.micro_batch_size * (world_size if alike else 1))

    def level_of(run: Config) -> Level:
        return costs.level(run, world_size) if costs else without_shards(run, world_size, rows.mean.tokens)

    def time_of(run: Config) -> StepTime:
        return step_time(sizes, run, deepspeed_config, row_of(run), nodes, gpus_per_node, card, level_of(run))

    zero = deepspeed_config["zero_optimization"]
    timed = not any(offloads(zero, part) for part in ("param", "optimizer"))
    cuts = {size: with_micro_batch(config, size, world_size) for size in candidates(config.train, world_size)}
    fitting = [size for size, cut in cuts.items() if memory_of(cut).peak <= limit_bytes]
    fastest = None
    if timed and not config.data.packing:
        fastest = min(fitting, key=lambda size: round(time_of(cuts[size]).step_s, 6), default=None)
    level = level_of(config)
    return Estimate(
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        sizes=sizes,
        rows=rows,
        memory=memory_of(config),
        limit_bytes=limit_bytes,
        offload_bytes=offloaded_bytes,
        traffic=traffic(sizes, config, deepspeed_config, row_of(config), nodes, gpus_per_node, level.micro_steps),
        time=time_of(config) if timed else None,
        level=level,
        samples_per_step=samples_per_step,
        micro_batch_size=config.train.micro_batch_size,
        packed=config.data.packing,
        fastest=(fastest, time_of(cuts[fastest]).step_s) if fastest else None,
        checkpoint_bytes=checkpoint_bytes(sizes, config),
        host_copy_bytes=copied_bytes,
        mem_bytes=mem_bytes,
    )


def check_fits(config: Config, nodes: int, gpus_per_node: int, gpu: str, mem_bytes: float | None = None) -> None:
    """Refuses a run whose memory does not fit.

    Args:
        mem_bytes: host memory of a node; None: not checked.

    Raises:
        ConfigError: it does not fit (the message says what to change), or see `estimate`.
    """
    found = estimate(config, nodes, gpus_per_node, gpu, mem_bytes)
    if not found.fits_host:
        raise ConfigError(
            f"the run does not fit in the nodes' memory (model.path={config.model.path}): it "
            f"{found.lack_of_host_memory}"
        )
    if not found.fits:
        raise ConfigError(
            f"the run does not fit in GPU memory (model.path={config.model.path} on {nodes} x {gpus_per_node} {gpu}): "
            f"it needs {found.memory.peak / GIB:.1f} GiB per GPU by the estimate of `mirage-launch plan`; "
            f"{found.limit_bytes / GIB:.1f} GiB available; use {', or '.join(found.advice)}"
        )


def checkpoint_bytes(sizes: ModelSizes, config: Config) -> int:
    """12 bytes per trained element (master weight and two moments) + what is frozen in `train.dtype`, but for the base
    of an adapter."""
    trained = sum(sizes.trained.all)
    frozen = 0 if config.model.lora is not None else sum(sizes.all) - trained
    return ADAM_BYTES * trained + DTYPES[config.train.dtype].itemsize * frozen


def host_needs(sizes: ModelSizes, config: Config, nodes: int, gpus_per_node: int) -> tuple[int, int]:
    """Bytes of a node's host memory: for what is offloaded, and for the copy of its ranks' checkpoints."""
    world_size = nodes * gpus_per_node
    offloaded = offload_bytes(sizes, config, resolve_deepspeed_config(config), world_size)
    copied = -(-checkpoint_bytes(sizes, config) // nodes) if config.checkpoint.in_background else 0
    return gpus_per_node * offloaded, copied


def find_advice(found: Estimate) -> tuple[str, ...]:
    """Changes, each of which makes the run fit; single ones; else settings combined, if needed with more nodes."""
    sizes, config, nodes, gpus_per_node = found.sizes, found.config, found.nodes, found.gpus_per_node

    def fits(changed: Config, num_nodes: int) -> bool:
        deepspeed_config = resolve_deepspeed_config(changed)
        largest = found.rows.largest_of(changed.rows_per_micro_batch)
        memory = estimate_memory(sizes, changed, deepspeed_config, largest, num_nodes * gpus_per_node)
        host = sum(host_needs(sizes, changed, num_nodes, gpus_per_node))
        return memory.peak <= found.limit_bytes and (found.mem_bytes is None or host <= USABLE * found.mem_bytes)

    changes = list(all_savings(config, nodes * gpus_per_node))
    single = [setting for setting, changed in changes if fits(changed, nodes)]
    single += more_nodes(config, fits, nodes, gpus_per_node)
    if single:
        return tuple(single)
    settings, combined = [], config
    for setting, _ in changes:
        settings.append(setting)
        combined = dict(all_savings(combined, nodes * gpus_per_node))[setting]
        if fits(combined, nodes):
            return (" and ".join(settings),)
    with_more_nodes = more_nodes(combined, fits, nodes, gpus_per_node)
    if with_more_nodes:
        return (" and ".join([*settings, with_more_nodes[0]]),)
    return (
        f"another GPU or a smaller model: {MAX_NODES} nodes of this GPU are too few even with all of these settings",
    )


def all_savings(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    """The smallest micro-batch, under the name of `auto`, which takes the largest that fits; and other settings."""
    if config.rows_per_micro_batch > 1:
        yield setting_of("auto", config.train, world_size), with_micro_batch(config, 1, world_size)
    yield from savings(config)


def more_nodes(config: Config, fits: Callable[[Config, int], bool], nodes: int, gpus_per_node: int) -> list[str]:
    """The smallest doubling of the nodes that fits, with the global batch size that it needs."""
    more = 2 * nodes
    while more <= MAX_NODES:
        if fits(config, more):
            return [f"--nodes {more}" + _batch_setting(config, more * gpus_per_node)]
        more *= 2
    return []


def _batch_setting(config: Config, world_size: int) -> str:
    share = world_size * config.train.micro_batch_size
    size = config.train.global_batch_size
    if size is None or size % share == 0:
        return ""
    return f" with train.global_batch_size={-(-size // share) * share} (a multiple of {share})"
