"""Formula for the host memory of what DeepSpeed offloads.

tests/distributed/test_plan_memory.py compares it with a real run.
"""

from typing import Any

from mirage_ds.checkpoint.save import ADAM_BYTES
from mirage_ds.config import Config
from mirage_ds.model.backbone import DTYPES
from mirage_ds.sizing.memory import FP32_BYTES, REDUCTION_BYTES, shard_numel
from mirage_ds.sizing.model_sizes import ModelSizes


def offload_bytes(sizes: ModelSizes, config: Config, deepspeed_config: dict[str, Any], world_size: int) -> int:
    """Bytes of host memory per rank that `offload_optimizer` and `offload_param` take, with the device `cpu`.

    optimizer    T / W x (12 for the float32 masters and AdamW's moments + bytes of data_types.grad_accum_dtype for the
                 accumulated gradients + 4 for the float32 copy of these that the update reads)
    parameters   e / W x all elements

    T trained elements, W ranks, e bytes of an element in `train.dtype` (DS stage3.py: _setup_for_real_optimizer,
    initialize_optimizer_states, _create_param_groups_fp16_flat_cpu_memory). Not counted: that torch rounds pinned
    blocks up to powers of two, and the buffers of the device `nvme`.
    """
    zero = deepspeed_config["zero_optimization"]
    total = 0
    if _is_on_host(zero, "optimizer"):
        accumulated = REDUCTION_BYTES[deepspeed_config["data_types"]["grad_accum_dtype"]]
        total += shard_numel(sizes.trained.all, world_size) * (ADAM_BYTES + accumulated + FP32_BYTES)
    if _is_on_host(zero, "param"):
        total += shard_numel(sizes.all, world_size) * DTYPES[config.train.dtype].itemsize
    return total


def _is_on_host(zero: dict[str, Any], part: str) -> bool:
    return bool(zero.get(f"offload_{part}", {}).get("device") == "cpu")
