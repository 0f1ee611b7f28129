"""Specifications of GPUs, and how much of them a run is assumed to reach.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM and L40S, and its white paper of the Ada architecture for
the RTX 4090 (dense rates, without sparsity, accumulated in float32); the network is that of NVIDIA's DGX of the same
generation, one adapter per GPU: 400 Gb/s (DGX H100, H200) and 200 Gb/s (DGX A100). L40S and RTX 4090 have no NVLink:
PCIe 4.0 x16 takes its place, and a network of 200 Gb/s is assumed.
"""

from dataclasses import dataclass

from mirage_ds.config import Dtype
from mirage_ds.errors import ConfigError
from mirage_ds.recipe import hint

# Assumptions, none of them measured.
USABLE = 0.90  # of the memory; the rest is for CUDA, NCCL, fragmentation and what the formulas omit
COMPUTE_EFFICIENCY = 0.40  # of the peak rate, in large matrix products
MEMORY_EFFICIENCY = 0.80  # of the memory bandwidth
LINK_EFFICIENCY = 0.70  # of the NVLink and network bandwidth, in collectives


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the network."""

    memory_bytes: float
    flops: dict[Dtype, float]  # per second
    memory_bandwidth: float  # bytes/s
    nvlink_bandwidth: float  # bytes/s, one direction; of PCIe where there is none
    network_bandwidth: float  # bytes/s, one direction


GPUS = {
    "a100-40gb": Gpu(40e9, {"bf16": 312e12, "fp32": 19.5e12}, 1.555e12, 300e9, 25e9),
    "a100-80gb": Gpu(80e9, {"bf16": 312e12, "fp32": 19.5e12}, 2.039e12, 300e9, 25e9),
    "rtx4090-24gb": Gpu(24e9, {"bf16": 165.2e12, "fp32": 82.6e12}, 1.008e12, 32e9, 25e9),
    "l40s-48gb": Gpu(48e9, {"bf16": 362e12, "fp32": 91.6e12}, 0.864e12, 32e9, 25e9),
    "h100-80gb": Gpu(80e9, {"bf16": 989e12, "fp32": 67e12}, 3.35e12, 450e9, 50e9),
    "h200-141gb": Gpu(141e9, {"bf16": 989e12, "fp32": 67e12}, 4.8e12, 450e9, 50e9),
}
# As the driver names them. Other forms of a card (PCIe, NVL) and its parts (MIG) have other rates, and other names.
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA GeForce RTX 4090": "rtx4090-24gb",
    "NVIDIA L40S": "l40s-48gb",
}


def find_gpu(name: str) -> Gpu:
    """The specifications of a GPU.

    Raises:
        ConfigError: the table has no such GPU.
    """
    if name not in GPUS:
        raise ConfigError(
            f"unknown GPU (--gpu {name}): {hint(name, GPUS)}; use one of these, or add yours to "
            "mirage_ds/sizing/gpus.py"
        )
    return GPUS[name]


def gpu_of_device(name: str) -> Gpu | None:
    """The specifications of the GPU that the driver calls so; None if the table does not have it."""
    return GPUS[DEVICE_NAMES[name]] if name in DEVICE_NAMES else None
