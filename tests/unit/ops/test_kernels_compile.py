"""The kernels compile for GPUs, without a GPU: the compiler may refuse what the interpreter accepts.

Sizes and pointers are declared divisible by 16, like the real ones.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mirage_ds.ops import latent_pool_kernel as kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set, so that Triton does not compile"
)
DIM = 3584
CAPABILITIES = (80, 90, 100)  # A100, H100, B200
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def ptx_of(kernel: Any, capability: int, num_warps: int, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The assembly of a kernel with arguments of these Triton types."""
    signature = types | dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i, name in enumerate(types) if types[name][0] == "*" or name == "dim"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}).asm["ptx"]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("has_index", [False, True], ids=["rows in order", "index"])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_pool(capability: int, dtype: torch.dtype, has_index: bool) -> None:
    """Each thread has eight 16-byte loads of a tile in flight, as the table of launch shapes assumes.

    Inputs are rounded to nearest, as torch does, so that kept targets give the same ones.
    """
    shape = kernels.launch_shape(DIM, dtype)
    types = {"patch_embeds": f"*{NAMES[dtype]}", "bounds": "*i64", "index": "*i64"}
    types |= {"inputs": f"*{NAMES[dtype]}", "targets": "*fp32", "squares": "*fp32", "dim": "i32"}
    constants = {"HAS_INDEX": has_index, "BLOCK_ROWS": shape.block_rows, "BLOCK_DIM": shape.block_dim}
    ptx = ptx_of(kernels._pool_kernel, capability, shape.num_warps, types, constants)
    assert len(re.findall(r"ld\.global\S*\.v4\.", ptx)) == 8
    roundings = set(re.findall(r"cvt\.(\w+)\.b?f16(?:x2)?\.f32", ptx))
    assert roundings == (set() if dtype == torch.float32 else {"rn"})


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_mean_backward(capability: int, dtype: torch.dtype) -> None:
    shape = kernels.launch_shape(DIM, torch.float32)
    types = {"row_grads": "*fp32", "patch_bounds": "*i64", "segments": "*i64", "grad": f"*{NAMES[dtype]}"}
    types |= {"num_patches": "i32", "dim": "i32", "most_segments": "i32"}
    constants = {"BLOCK_ROWS": shape.block_rows, "BLOCK_DIM": shape.block_dim}
    ptx = ptx_of(kernels._mean_backward_kernel, capability, shape.num_warps, types, constants)
    assert len(re.findall(r"ld\.global\S*\.v4\.", ptx)) == 8
    assert "atom." not in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_inverse_norm(capability: int) -> None:
    types = {"squares": "*fp32", "inverse_norms": "*fp32", "num_parts": "i32", "eps": "fp32"}
    ptx = ptx_of(kernels._inverse_norm_kernel, capability, 1, types, {"BLOCK": 8})
    assert len(re.findall(r"st\.global", ptx)) == 1
