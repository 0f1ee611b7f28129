"""Helper-image patch embeddings to latents, as one functional op: ragged segments of any images in one pass.

What it computes is defined in reference.py, which segments there are in segments.py. CUDA tensors take the Triton
kernels (latent_pool_kernel.py), CPU tensors the definition; TRITON_INTERPRET=1, set before the start, makes CPU
tensors take the kernels too, interpreted.

Segments and index stay on the host until they were checked, so that a wrong number is an error before anything is
launched, and no check waits for the device. The op returns new tensors: an op that wrote into inputs_embeds could not
register a gradient, and would leak one to the row of <|latent_pad|>.

Shape legend: P patches, D hidden, N segments, M entries of the index.
"""

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from mirage_ds.errors import ConfigError
from mirage_ds.ops import latent_pool_definition as reference

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
        num_latents: N as the caller counts its latents.
        out_dtype: of the inputs; one of DTYPES.

    Returns:
        Inputs [N, D] in out_dtype (what the decoder is fed), targets [N, D] float32, inverse norms of the targets [N]
        float32. All are differentiable.

    Raises:
        ValueError: the arguments do not fit together; nothing was launched.
        ConfigError: a CUDA tensor without the package triton.
    """
    _check(patch_embeds, bounds, index, num_latents, out_dtype)
    if takes_kernel(patch_embeds.device):
        return _kernels().pool(patch_embeds, bounds, index, out_dtype, reference.EPS)
    return reference.latent_pool(patch_embeds, bounds, index, out_dtype)


@torch.library.custom_op("mirage_ds::latent_pool_backward", mutates_args=())
def latent_pool_backward(
    mean_grads: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Gradients of the segments' means -> the gradient of patch_embeds; called by the op's autograd alone.

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
    return reference.mean_backward(mean_grads, bounds, index, num_rows).to(dtype)


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
    """d (1 / ||t||) = -t / ||t||^3, and 0 where EPS stands for the norm."""
    bounds, index, targets, inverse_norms = ctx.saved_tensors
    slopes = torch.where(inverse_norms < 1 / reference.EPS, grad_inverse_norms * inverse_norms**3, 0)
    mean_grads = grad_targets + grad_inputs.float() - slopes[:, None] * targets
    return latent_pool_backward(mean_grads, bounds, index, ctx.num_rows, ctx.dtype), None, None, None, None


latent_pool.register_autograd(_backward, setup_context=_setup_context)


def takes_kernel(device: torch.device) -> bool:
    """Whether tensors on `device` take the kernels."""
    return device.type == "cuda" or interprets()


def interprets() -> bool:
    """Whether Triton interprets: its own reading of the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def describe_path(device: torch.device) -> str:
    """Which path `latent_pool` takes on `device`, for the start of the log.

    Raises:
        ConfigError: it takes the kernels, and triton is not installed.
    """
    if not takes_kernel(device):
        return f"latent_pool: plain torch on {device.type}"
    how = "interpreted" if interprets() else "compiled"
    return f"latent_pool: Triton {_kernels().triton.__version__} kernels on {device.type}, {how}"


def _kernels() -> ModuleType:
    """Triton comes with torch for CUDA, so that its absence is a fault there and none elsewhere."""
    if find_spec("triton") is None:
        raise ConfigError(
            "the package triton is missing (latent_pool, on GPU tensors or with TRITON_INTERPRET=1); allowed is the "
            f"version that torch for CUDA brings; install that torch, or `pip install {TESTED_TRITON}`"
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
        raise _error(f"patch_embeds lie on {patch_embeds.device}", "the CPU or a CUDA GPU", "move them there")
    if patch_embeds.dim() != 2 or not patch_embeds.is_contiguous():
        raise _error(
            f"patch_embeds have shape {list(patch_embeds.shape)} and strides {list(patch_embeds.stride())}",
            "a contiguous [P, D]",
            "call .contiguous()",
        )
    if patch_embeds.dtype not in DTYPES or out_dtype not in DTYPES:
        raise _error(f"the dtypes are {patch_embeds.dtype} and {out_dtype}", f"each of {DTYPES}", "convert before")
    for name, tensor in (("bounds", bounds), ("index", index)):
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise _error(
                f"{name} is {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}",
                "contiguous int64 on the CPU, where it can be checked without waiting for the device",
                "leave it there as segments.py makes it",
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
                f"index has shape {list(index.shape)} or a row that is not there",
                f"[M] of rows 0 .. {num_rows - 1}",
                "make it of the images that the patches are of",
            )
        num_rows = len(index)
    begins, ends = bounds.unbind(1)
    wrong = (begins < 0) | (begins >= ends) | (ends > num_rows)
    if wrong.any():
        raise _error(
            f"the bounds of a segment are {bounds[wrong][0].tolist()}",
            f"0 <= begin < end <= {num_rows}",
            "give every latent at least one of the rows that there are",
        )


def _error(what: str, allowed: str, remedy: str) -> ValueError:
    return ValueError(f"{what} (latent_pool); allowed is {allowed}; {remedy}")
