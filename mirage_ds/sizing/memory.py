"""Formulas for the memory that a run needs on each GPU, by kind.

tests/distributed/test_plan_memory.py compares them with a real run.

Legend: W ranks, D hidden, I intermediate, V vocabulary, T trained elements, e bytes of an element in
`train.dtype`. DS: deepspeed 0.19.8, runtime/zero/.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mirage_ds.checkpoint.save import ADAM_BYTES
from mirage_ds.config import Config
from mirage_ds.model.backbone import DTYPES
from mirage_ds.model.losses import LOGIT_BLOCK_ELEMENTS
from mirage_ds.sizing.measured import masks_samples
from mirage_ds.sizing.model_sizes import ModelSizes, Parts
from mirage_ds.sizing.workload import Row, Size
from mirage_ds.zero3.engine import choose_gather

REDUCTION_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4
# DeepSpeed's defaults for keys that the file does not set (DS config.py).
DEFAULT_LIVE = 1_000_000_000  # of stage3_max_live_parameters, stage3_max_reuse_distance and sub_group_size
DEFAULT_BUCKET = 500_000_000
DEFAULT_PREFETCH = 50_000_000
DEFAULT_THRESHOLD = 100_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parameters: int
    """Resident: this rank's shards, and full copies of small parameters."""
    optimizer: int
    """Resident: float32 master weights and AdamW's moments."""
    gradients: int
    """Resident: this rank's accumulated gradients and the reduction bucket."""
    gathered: int
    """Peak of the gathered weights."""
    activations: int
    """What forward stores for backward, and the activations of one layer while it is recomputed."""
    logits: int
    """One block of logits and its gradient."""
    gathering: int
    """The buffer that weights are gathered into, before each is copied out of it."""
    full_gradients: int
    """Gradients of gathered weights, waiting for their reduction."""
    reducing: int
    """A copy of the gradients that are being reduced, in the communication dtype."""
    update: int
    """The optimizer's copy of this rank's gradients, during its step."""
    evaluation: int
    """What an evaluation in training needs: the whole model, and one batch that is decoded; 0 without one."""

    @property
    def resident(self) -> int:
        return self.parameters + self.optimizer + self.gradients

    @property
    def peak(self) -> int:
        """Weights are gathered before their gradients exist, and both are freed before the optimizer steps. Evaluations
        come between two steps."""
        backward = (
            self.gathered + self.activations + self.logits + max(self.gathering, self.full_gradients + self.reducing)
        )
        return self.resident + max(backward, self.update, self.evaluation)


def estimate_memory(
    sizes: ModelSizes, config: Config, deepspeed_config: dict[str, Any], row: Row, world_size: int
) -> Memory:
    """All kinds for a micro-batch of rows of this size, padding included: see `Workload.largest_of`."""
    zero = deepspeed_config["zero_optimization"]
    rows, e = config.rows_per_micro_batch, DTYPES[config.train.dtype].itemsize
    trained = sizes.trained.all
    shard = shard_numel(trained, world_size)
    offloaded = {part: offloads(zero, part) for part in ("param", "optimizer")}
    # One rank computes with its own shards, nothing is copied (DS partition_parameters.py, _no_gather_coalesced).
    whole = world_size == 1 and not offloaded["param"]
    gathered, gathering = (0, 0) if whole else gathered_elements(sizes, config, zero)
    weights = 0 if whole else sum(sizes.all) - persistent_numel(sizes.all, zero)
    return Memory(
        parameters=parameter_bytes(sizes, zero, world_size, e, offloaded=offloaded["param"]),
        optimizer=0 if offloaded["optimizer"] else shard * ADAM_BYTES,
        gradients=gradient_bytes(shard, deepspeed_config, offloaded=offloaded["optimizer"]),
        gathered=gathered * e,
        activations=rows * int(activation_bytes(sizes, config, row, e)),
        logits=logit_bytes(sizes, rows * row.targets, e),
        gathering=gathering * e,
        full_gradients=waiting_gradients(sizes, config) * e,
        reducing=reduced_elements(sizes, zero) * REDUCTION_BYTES[deepspeed_config["communication_data_type"]],
        update=0 if offloaded["optimizer"] else min(shard, largest_group(zero, trained, world_size)) * FP32_BYTES,
        evaluation=0 if config.evaluation.task is None else e * weights + decoding_bytes(sizes, config, row, e),
    )


def offloads(zero: dict[str, Any], part: str) -> bool:
    """Whether DeepSpeed keeps `param` or `optimizer` outside the GPU."""
    return bool(zero.get(f"offload_{part}", {}).get("device", "none") != "none")


def shard_numel(numels: Iterable[int], world_size: int) -> int:
    """Each parameter is split into W equal parts, the last padded (DS partition_parameters.py, _partition_param)."""
    return sum(math.ceil(numel / world_size) for numel in numels)


def parameter_bytes(sizes: ModelSizes, zero: dict[str, Any], world_size: int, e: int, *, offloaded: bool) -> int:
    """e x (sum of ceil(numel / W) + full copies of parameters of at most stage3_param_persistence_threshold elements).

    What is frozen is sharded like the rest and has neither master weights nor moments.
    """
    shards = 0 if offloaded else shard_numel(sizes.all, world_size)
    return e * (shards + persistent_numel(sizes.all, zero))


def persistent_numel(numels: Iterable[int], zero: dict[str, Any]) -> int:
    """Elements of small parameters, of which DeepSpeed keeps a full copy on every rank."""
    threshold = zero.get("stage3_param_persistence_threshold", DEFAULT_THRESHOLD)
    return sum(numel for numel in numels if numel <= threshold)


def gradient_bytes(shard: int, deepspeed_config: dict[str, Any], *, offloaded: bool) -> int:
    """T / W x bytes of data_types.grad_accum_dtype + reduce_bucket_size x bytes of communication_data_type.

    DS stage3.py, _setup_for_real_optimizer: grad_partitions_flat_buffer and the buffer of IPGBucketZ3.
    """
    accumulated = 0 if offloaded else shard * REDUCTION_BYTES[deepspeed_config["data_types"]["grad_accum_dtype"]]
    bucket = deepspeed_config["zero_optimization"].get("reduce_bucket_size", DEFAULT_BUCKET)
    return accumulated + bucket * REDUCTION_BYTES[deepspeed_config["communication_data_type"]]


def gathered_elements(sizes: ModelSizes, config: Config, zero: dict[str, Any]) -> tuple[int, int]:
    """Peak elements of the gathered weights, and elements of the buffer for the largest gather.

    rollout: the language model. Its embedding stays gathered, as DeepSpeed does not count a leaf module's elements
        towards the reuse distance; one gather, which begins while the tower runs, brings both.
    layer, in one pass: at most stage3_max_live_parameters and the layer that is needed next, or the tower, which always
        is; one gather brings stage3_prefetch_bucket_size elements, or a larger layer or weight.
    groups, and layer in several passes: the group in use and the next one, or the buffer for it; and embedding and
        head, or the larger of them where both exceed the reuse distance.
    In all cases what DeepSpeed gathers stays so if it is smaller than stage3_max_reuse_distance (DS
    partitioned_param_coordinator.py, __params_to_release).
    """
    everything = sum(sizes.all) - persistent_numel(sizes.all, zero)
    language, tower = sum(sizes.language), sum(sizes.tower)
    reuse_distance = zero.get("stage3_max_reuse_distance", DEFAULT_LIVE)
    if choose_gather(config) == "rollout":
        small = language < reuse_distance
        gathered = everything if small else max(language - persistent_numel(sizes.language, zero), tower)
        return gathered, language
    if group := group_elements(sizes, config):
        rest = [sum(sizes.embedding), sum(sizes.head)]
        held = sum(rest) if sum(rest) < reuse_distance else max(rest)
        return max(min(2 * group, sum(sizes.layers)) + held, tower), 0
    small = language < reuse_distance
    live = max(zero.get("stage3_max_live_parameters", DEFAULT_LIVE) + unit_elements(sizes, sizes.num_layers), tower)
    bucket = max(zero.get("stage3_prefetch_bucket_size", DEFAULT_PREFETCH), unit_elements(sizes, sizes.num_layers))
    return everything if small else min(everything, live), min(bucket, everything)


def group_elements(sizes: ModelSizes, config: Config) -> int:
    """Elements of the largest group of layers that is gathered by itself, inside the passes; 0: there are none."""
    if choose_gather(config) == "rollout" or not config.several_passes:
        return 0
    layers = config.model.gather_layers if choose_gather(config) == "groups" else 1
    return sum(sizes.layers) // sizes.num_layers * min(layers, sizes.num_layers)


def unit_elements(parts: Parts, num_layers: int) -> int:
    """The largest unit of `layer` in one pass, besides the tower: a decoder layer, the embedding or the head."""
    return max([sum(parts.layers) // num_layers, *parts.language])


def waiting_gradients(sizes: ModelSizes, config: Config) -> int:
    """Elements of trained weights whose full gradients exist at the same time.

    A leaf module's gradients are reduced after its backward (DS stage3.py, reduce_leaf_module_grads): those of the
    complete rollout, of one layer, or of the head alone. Of groups each weight's are reduced by themselves, in the
    backward of the first pass: all later ones leave theirs as factors, see `deferred_bytes`.
    """
    trained = sizes.trained
    if choose_gather(config) == "rollout":
        waiting = sum(trained.rollout)
    elif config.several_passes:
        waiting = max(trained.language, default=0)
    else:
        waiting = unit_elements(trained, sizes.num_layers)
    return max(waiting, sum(trained.tower))


def reduced_elements(sizes: ModelSizes, zero: dict[str, Any]) -> int:
    """Elements that are copied to be reduced: a bucket, or one larger weight (DS stage3.py, __avg_scatter_grads)."""
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    return max(min(bucket, sum(sizes.trained.all)), *sizes.trained.all)


def activation_bytes(sizes: ModelSizes, config: Config, row: Row, e: int) -> Size:
    """Bytes that one row takes in the tower and the decoder; a frozen tower's are freed before the decoder's exist.

    Like all that it is made of also of n rows at once, [n].
    """
    kept = kept_bytes(sizes, config, row, e) + deferred_bytes(sizes, config, row, e)
    if config.model.activation_checkpointing == "full":
        # The recomputed activations and their gradients, of one pass at a time, which attends to at most all columns.
        kept += 2 * layer_bytes(sizes, replace(row, attended=np.minimum(row.attended, row.tokens)), e)
    if config.model.train_merger:
        kept = kept + row.patches * merger_bytes(sizes, e)
    tower = row.patches * tower_bytes(sizes, config, e)
    return kept + tower if config.model.train_tower else np.maximum(kept, tower)


def kept_bytes(sizes: ModelSizes, config: Config, row: Row, e: int) -> Size:
    """Bytes that forward stores of one row.

    With activation checkpointing, in each layer of each pass: the layer's input, D e per column; in stage 2 also the
    keys and values that later passes use. Without it, and in passes of one column: see `layer_bytes`. (Where such a
    pass is recomputed, the inputs and the gradients that it leaves for later, see `DeferredGradient`, take less.)
    In addition: the input embeddings, D e; the final norm, D (4 + e); cos and sin, 2 x head_dim x e; the rows of the
    head, D e per supervised token; the mask of a packed row, L^2 e.
    """
    hidden = sizes.hidden
    if config.model.activation_checkpointing == "full":
        layer = hidden * e * row.tokens + row.past * key_value_bytes(sizes, e)
        layer += row.single_columns * (column_bytes(sizes, e) - hidden * e)
    else:
        layer = layer_bytes(sizes, row, e)
    once = row.tokens * (hidden * e + hidden * (FP32_BYTES + e) + 2 * sizes.head_dim * e) + row.targets * hidden * e
    mask = row.tokens**2 * e if masks_samples(config) else 0
    return sizes.num_layers * layer + once + mask


def deferred_bytes(sizes: ModelSizes, config: Config, row: Row, e: int) -> Size:
    """Bytes that the passes after the first leave for its backward, where layers are gathered by groups.

    Per column and layer the inputs of the matrices, 3 D + I, and the gradients of their outputs, 3 D + 2 I and those of
    keys and values: see `DeferredGradient`; of an adapter also A x and its gradient. The columns of one are among them
    with `rollout` too, where they are few.
    """
    if not group_elements(sizes, config) or not sizes.trained.layers:
        return 0 * row.later
    column = (6 * sizes.hidden + 3 * sizes.intermediate) * e + key_value_bytes(sizes, e)
    column += 2 * sizes.adapter_rank * e
    return sizes.num_layers * row.later * column


def layer_bytes(sizes: ModelSizes, row: Row, e: int) -> Size:
    """Bytes that autograd stores of one decoder layer and row; per column:

    - each of two norms: its input in float32, the normalized input and its output: D (4 + 2 e)
    - queries and the attention's output: 2 D e; keys and values: 2 x kv_heads x head_dim x e
    - the MLP's gate, its activation, up, and their product: 4 I e
    In stage 2 keys and values are kept once. They are repeated for every head, 2 D e per column that is attended to, in
    each pass for which SDPA has a mask: those over several columns (the first one only if a row is padded on the left),
    and all if a row is padded on the left. So are those of a packed row.
    """
    kept = np.where(row.blocks, row.past, row.tokens)
    repeated = row.attended * 2 * sizes.hidden * e
    return row.tokens * column_bytes(sizes, e) + kept * key_value_bytes(sizes, e) + repeated


def column_bytes(sizes: ModelSizes, e: int) -> int:
    """Bytes that autograd stores of one column in one decoder layer, without keys and values.

    An adapter adds A x of each of its matrices: the sum of their ranks x e.
    """
    own = 2 * sizes.hidden * (FP32_BYTES + 2 * e) + 2 * sizes.hidden * e + 4 * sizes.intermediate * e
    return own + sizes.adapter_rank * e


def key_value_bytes(sizes: ModelSizes, e: int) -> int:
    """One column's keys and values in one layer: 2 x kv_heads x head_dim x e."""
    return 2 * sizes.kv_heads * sizes.head_dim * e


def tower_bytes(sizes: ModelSizes, config: Config, e: int) -> int:
    """Bytes that a block of the tower stores per patch, as in `layer_bytes`; of all blocks if the tower is trained."""
    hidden, inner = sizes.tower_hidden, sizes.tower_intermediate
    block = 2 * hidden * (FP32_BYTES + 2 * e) + 4 * hidden * e + 4 * inner * e
    return block * (sizes.tower_blocks if config.model.train_tower else 1)


def merger_bytes(sizes: ModelSizes, e: int) -> int:
    """Bytes that a trained merger stores per patch: of its norm, and of its activation, as in `layer_bytes`."""
    return sizes.tower_hidden * (FP32_BYTES + 2 * e) + 2 * sizes.tower_hidden * e


def decoding_bytes(sizes: ModelSizes, config: Config, row: Row, e: int) -> int:
    """One batch of prompts, each taken as long as `row`; besides, all weights are there.

    Per prompt: keys and values of its columns and of max_new_tokens more, in all layers, and once more in the layer
    whose cache grows; the larger of one layer's activations over the prompt, one block's in the tower, and its logits
    in float32 with their copy.
    """
    columns = row.tokens + config.evaluation.max_new_tokens
    cache = (sizes.num_layers + 1) * columns * key_value_bytes(sizes, e)
    block = tower_bytes(sizes, config, e) // (sizes.tower_blocks if config.model.train_tower else 1)
    prompt = max(row.tokens * column_bytes(sizes, e), row.patches * block, 2 * FP32_BYTES * sizes.vocab)
    return config.evaluation.batch_size * (cache + prompt)


def logit_bytes(sizes: ModelSizes, targets: int, e: int) -> int:
    """2 x e x V x min(supervised tokens, rows of a block): the logits of one block and their gradient (losses.py)."""
    block = max(1, LOGIT_BLOCK_ELEMENTS // sizes.vocab)
    return 2 * e * sizes.vocab * min(targets, block)


def largest_group(zero: dict[str, Any], trained: Iterable[int], world_size: int) -> int:
    """Elements that one optimizer step updates at a time: sub_group_size, and the parameter that exceeds it."""
    return int(zero.get("sub_group_size", DEFAULT_LIVE)) + max(math.ceil(numel / world_size) for numel in trained)
