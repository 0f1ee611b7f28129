"""Pools helper-image patch embeddings to latents, as one functional op: ragged segments of many images in one call.

latent_pool_definition.py defines what it computes, segments.py makes the segments. CUDA tensors use the Triton kernels
(latent_pool_kernel.py), CPU tensors the definition. With TRITON_INTERPRET=1, set before the start, CPU tensors use the
kernels too, interpreted.

Bounds and index stay on the host until they are checked, so that a wrong number is an error before any launch, and no
check waits for the device. The op returns new tensors: an op that wrote into inputs_embeds could not register a
gradient, and would pass one on to the row of <|latent_pad|>.

Shape legend: P patches, D hidden, N segments, M entries of the index.
"""

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from mirage_ds.errors import ConfigError
from mirage_ds.ops import latent_pool_definition as definition

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TESTED_TRITON = "triton==3.7.1"  # what torch 2.13.0 for CUDA requires


@torch.library.custom_op("mirage_ds::latent_pool", mutates_args=())
def latent_pool(
    patch_embeds: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor | None,
    num_latents: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of segments of rows.

    Args:
        patch_embeds: [P, D] float32, bfloat16 or float16, contiguous, on any GPU or the CPU.
        bounds: [N, 2] int64 on the CPU: begin and end of each segment, in `index`, or without it in patch_embeds.
            Segments may overlap and need not cover everything.
        index: [M] int64 on the CPU: rows of patch_embeds in the order in which segments read them; None: as they are.
        num_latents: N, as the caller counts its latents.
        out_dtype: of the inputs; one of DTYPES.

    Returns:
        Inputs [N, D] in out_dtype (what the decoder is fed), targets [N, D] float32, inverse norms of the targets [N]
        float32. All are differentiable.

    Raises:
        ValueError: the arguments do not fit together; nothing was launched.
        ConfigError: patch_embeds is a CUDA tensor, and the package triton is missing.
    """
    _check(patch_embeds, bounds, index, num_latents, out_dtype)
    if takes_kernel(patch_embeds.device):
        return _kernels().pool(patch_embeds, bounds, index, out_dtype, definition.EPS)
    return definition.latent_pool(patch_embeds, bounds, index, out_dtype)


@torch.library.custom_op("mirage_ds::latent_pool_backward", mutates_args=())
def latent_pool_backward(
    mean_grads: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Gradients of the segments' means -> the gradient of patch_embeds; called only by the op's autograd.

    Args:
        mean_grads: [N, D] float32.
        bounds, index: those of the forward pass, which checked them.
        num_rows: P.
        dtype: of patch_embeds.

    Returns:
        [P, D] in `dtype`; rows in no segment get 0.
    """
    if takes_kernel(mean_grads.device):
        return _kernels().mean_backward(mean_grads, bounds, index, num_rows, dtype)
    return definition.mean_backward(mean_grads, bounds, index, num_rows).to(dtype)


@latent_pool.register_fake
def _(
    patch_embeds: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor | None,
    num_latents: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (num_latents, patch_embeds.shape[1])
    return (
        patch_embeds.new_empty(shape, dtype=out_dtype),
        patch_embeds.new_empty(shape, dtype=torch.float32),
        patch_embeds.new_empty(num_latents, dtype=torch.float32),
    )


@latent_pool_backward.register_fake
def _(
    mean_grads: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    return mean_grads.new_empty((num_rows, mean_grads.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    patch_embeds, bounds, index, _, _ = inputs
    _, targets, inverse_norms = output
    ctx.save_for_backward(bounds, index, targets, inverse_norms)
    ctx.num_rows, ctx.dtype = patch_embeds.shape[0], patch_embeds.dtype


def _backward(
    ctx: Any, grad_inputs: torch.Tensor, grad_targets: torch.Tensor, grad_inverse_norms: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """d (1 / ||t||) = -t / ||t||^3, and 0 where the norm is clamped to EPS."""
    bounds, index, targets, inverse_norms = ctx.saved_tensors
    slopes = torch.where(inverse_norms < 1 / definition.EPS, grad_inverse_norms * inverse_norms**3, 0)
    mean_grads = grad_targets + grad_inputs.float() - slopes[:, None] * targets
    return latent_pool_backward(mean_grads, bounds, index, ctx.num_rows, ctx.dtype), None, None, None, None


latent_pool.register_autograd(_backward, setup_context=_setup_context)


def takes_kernel(device: torch.device) -> bool:
    """Whether tensors on `device` use the kernels."""
    return device.type == "cuda" or interprets()


def interprets() -> bool:
    """Whether Triton interprets kernels, by the same values of the variable as Triton."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def describe_path(device: torch.device) -> str:
    """The implementation that `latent_pool` uses on `device`, for the start of the log.

    Raises:
        ConfigError: it uses the kernels, and triton is not installed.
    """
    if not takes_kernel(device):
        return f"latent_pool: plain torch on {device.type}"
    how = "interpreted" if interprets() else "compiled"
    return f"latent_pool: Triton {_kernels().triton.__version__} kernels on {device.type}, {how}"


def _kernels() -> ModuleType:
    """The module of kernels, imported late: triton comes with torch for CUDA and is not needed elsewhere."""
    if find_spec("triton") is None:
        raise ConfigError(
            "the package triton is missing (latent_pool, on GPU tensors or with TRITON_INTERPRET=1); expected the "
            f"version that torch for CUDA requires; install that torch, or `pip install {TESTED_TRITON}`"
        )
    from mirage_ds.ops import latent_pool_kernel

    return latent_pool_kernel


def _check(
    patch_embeds: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor | None,
    num_latents: int,
    out_dtype: torch.dtype,
) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if patch_embeds.device.type not in ("cpu", "cuda"):
        raise _error(f"patch_embeds are on {patch_embeds.device}", "the CPU or a CUDA GPU", "move them there")
    if patch_embeds.dim() != 2 or not patch_embeds.is_contiguous():
        raise _error(
            f"patch_embeds have shape {list(patch_embeds.shape)} and strides {list(patch_embeds.stride())}",
            "a contiguous [P, D]",
            "call .contiguous()",
        )
    if patch_embeds.dtype not in DTYPES or out_dtype not in DTYPES:
        raise _error(f"the dtypes are {patch_embeds.dtype} and {out_dtype}", f"each of {DTYPES}", "convert them before")
    for name, tensor in (("bounds", bounds), ("index", index)):
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise _error(
                f"{name} is {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}",
                "contiguous int64 on the CPU, where it can be checked without waiting for the device",
                "keep it on the CPU, as ops/segments.py makes it",
            )
    if bounds.shape != (num_latents, 2) or num_latents == 0:
        raise _error(
            f"bounds have shape {list(bounds.shape)} for {num_latents} latents",
            "[N, 2] for N >= 1 latents",
            "leave out the call where there is no helper image",
        )
    num_rows = patch_embeds.shape[0]
    if index is not None:
        if index.dim() != 1 or ((index < 0) | (index >= num_rows)).any():
            raise _error(
                f"index has shape {list(index.shape)} or a row that does not exist",
                f"[M] of rows 0 .. {num_rows - 1}",
                "make it for the images of these patches",
            )
        num_rows = len(index)
    begins, ends = bounds.unbind(1)
    wrong = (begins < 0) | (begins >= ends) | (ends > num_rows)
    if wrong.any():
        raise _error(
            f"the bounds of a segment are {bounds[wrong][0].tolist()}",
            f"0 <= begin < end <= {num_rows}",
            "give every latent at least one existing row",
        )


def _error(what: str, allowed: str, remedy: str) -> ValueError:
    return ValueError(f"{what} (latent_pool); expected {allowed}; {remedy}")
