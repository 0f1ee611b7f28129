"""The Triton kernels of latent_pool.py and their launchers. latent_pool_definition.py defines what they compute.

When it is imported, Triton decides whether it compiles or, with TRITON_INTERPRET=1, interprets in numpy. Its compiler
evaluates annotations and knows only its own types: every argument is annotated as a tl.tensor, even scalars.

Shape legend: P patches, D hidden, N segments, M entries of the index, S segments' entries over all patches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class LaunchShape(NamedTuple):
    """What one program covers."""

    block_rows: int
    block_dim: int
    num_warps: int


# (bytes of an element, largest D) -> tile. A tile is 16 KiB where D allows it: 128 bytes for each of 128 threads, so
# that every thread has eight 16-byte loads in flight; D is split so that few segments still make many programs. Chosen
# by this estimate, not yet timed.
LAUNCH_SHAPES = (
    (2, 256, LaunchShape(block_rows=32, block_dim=128, num_warps=4)),
    (2, 2**31, LaunchShape(block_rows=16, block_dim=512, num_warps=4)),
    (4, 256, LaunchShape(block_rows=32, block_dim=64, num_warps=4)),
    (4, 2**31, LaunchShape(block_rows=16, block_dim=256, num_warps=4)),
)


def launch_shape(dim: int, dtype: torch.dtype) -> LaunchShape:
    return next(shape for itemsize, largest, shape in LAUNCH_SHAPES if itemsize == dtype.itemsize and dim <= largest)


@triton.jit
def _pool_kernel(
    patch_embeds: tl.tensor,  # [P, D]
    bounds: tl.tensor,  # [N, 2] int64
    index: tl.tensor,  # [M] int64
    inputs: tl.tensor,  # [N, D], written
    targets: tl.tensor,  # [N, D] float32, written
    squares: tl.tensor,  # [N, programs along D] float32, written: each program's part of ||target||^2
    dim: tl.tensor,
    HAS_INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One segment, BLOCK_DIM columns: reads every patch once, writes both outputs from registers.

    Rows and segments are int64, and so are offsets: P * D exceeds 2^31 at 600 thousand patches of D = 3584. Elements
    past the end of a segment or of D are not loaded and count as 0. Sums are float32: BLOCK_ROWS partial sums in
    parallel, then their sum.
    """
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = columns < dim
    begin = tl.load(bounds + 2 * segment)
    end = tl.load(bounds + 2 * segment + 1)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=tl.float32)
    for first in range(begin, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        present = rows < end
        if HAS_INDEX:
            rows = tl.load(index + rows, mask=present, other=0)
        tile = patch_embeds + rows[:, None] * dim + columns[None, :]
        total += tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / (end - begin).to(tl.float32)
    place = segment * dim + columns
    tl.store(targets + place, mean, mask=inside)
    tl.store(inputs + place, mean.to(inputs.dtype.element_ty), mask=inside)
    tl.store(squares + segment * tl.num_programs(1) + tl.program_id(1), tl.sum(mean * mean, axis=0))


@triton.jit
def _inverse_norm_kernel(
    squares: tl.tensor,  # [N, num_parts] float32
    inverse_norms: tl.tensor,  # [N] float32, written
    num_parts: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """1 / max(sqrt(sum of squares), eps) of one segment; its parts are always added in the same order."""
    segment = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    square = tl.sum(tl.load(squares + segment * num_parts + parts, mask=parts < num_parts, other=0.0), axis=0)
    # Rounded to nearest, as in torch: for a norm of at most eps, the backward pass must find exactly 1 / eps.
    norm = tl.maximum(tl.sqrt_rn(square), eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(inverse_norms + segment, tl.div_rn(1.0, norm))


@triton.jit
def _mean_backward_kernel(
    row_grads: tl.tensor,  # [N, D] float32
    patch_bounds: tl.tensor,  # [P + 1] int64: where the segments of each patch begin in `segments`
    segments: tl.tensor,  # [S] int64
    grad: tl.tensor,  # [P, D], written
    num_patches: tl.tensor,
    dim: tl.tensor,
    most_segments: tl.tensor,  # largest number of segments of a patch
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """BLOCK_ROWS patches, BLOCK_DIM columns of grad[p] = sum of row_grads[s] over the segments s that p is in.

    Each patch gathers its segments, so there are no atomic additions and the result is deterministic. Patches in no
    segment get 0.
    """
    patches = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    real, inside = patches < num_patches, columns < dim
    begins = tl.load(patch_bounds + patches, mask=real, other=0)
    ends = tl.load(patch_bounds + patches + 1, mask=real, other=0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=tl.float32)
    for number in range(most_segments):
        present = begins + number < ends
        segment = tl.load(segments + begins + number, mask=present, other=0)
        tile = row_grads + segment[:, None] * dim + columns[None, :]
        total += tl.load(tile, mask=present[:, None] & inside[None, :], other=0.0)
    place = grad + patches[:, None] * dim + columns[None, :]
    tl.store(place, total.to(grad.dtype.element_ty), mask=real[:, None] & inside[None, :])


def pool(
    patch_embeds: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, out_dtype: torch.dtype, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward pass, for checked arguments, in two launches: the first reads the patches, the second only N rows of
    partial sums. Bounds and index come from the host; neither the copies nor the launches wait for the device.
    """
    device, dim = patch_embeds.device, patch_embeds.shape[1]
    num_segments, shape = len(bounds), launch_shape(dim, patch_embeds.dtype)
    num_parts = triton.cdiv(dim, shape.block_dim)
    inputs = torch.empty((num_segments, dim), dtype=out_dtype, device=device)
    targets = torch.empty((num_segments, dim), dtype=torch.float32, device=device)
    squares = torch.empty((num_segments, num_parts), dtype=torch.float32, device=device)
    inverse_norms = torch.empty(num_segments, dtype=torch.float32, device=device)
    device_bounds = _to_device(bounds, device)
    with torch.cuda.device_of(patch_embeds):
        _pool_kernel[(num_segments, num_parts)](
            patch_embeds,
            device_bounds,
            device_bounds if index is None else _to_device(index, device),
            inputs,
            targets,
            squares,
            dim,
            HAS_INDEX=index is not None,
            BLOCK_ROWS=shape.block_rows,
            BLOCK_DIM=shape.block_dim,
            num_warps=shape.num_warps,
        )
        _inverse_norm_kernel[(num_segments,)](
            squares, inverse_norms, num_parts, eps, BLOCK=triton.next_power_of_2(num_parts), num_warps=1
        )
    return inputs, targets, inverse_norms


def mean_backward(
    mean_grads: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """mean_backward of the definition, for float32 gradients [N, D] -> [num_rows, D] in `dtype`."""
    device, dim = mean_grads.device, mean_grads.shape[1]
    row_grads = (mean_grads / _to_device(bounds.diff(dim=1), device)).contiguous()  # autograd may pass any strides
    patch_bounds, segments = transpose(bounds, index, num_rows)
    most_segments = int(patch_bounds.diff().max())
    grad = torch.empty((num_rows, dim), dtype=dtype, device=device)
    shape = launch_shape(dim, torch.float32)
    with torch.cuda.device_of(grad):
        _mean_backward_kernel[(triton.cdiv(num_rows, shape.block_rows), triton.cdiv(dim, shape.block_dim))](
            row_grads,
            _to_device(patch_bounds, device),
            _to_device(segments, device),
            grad,
            num_rows,
            dim,
            most_segments,
            BLOCK_ROWS=shape.block_rows,
            BLOCK_DIM=shape.block_dim,
            num_warps=shape.num_warps,
        )
    return grad


def transpose(bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments of each row instead of the rows of each segment, on the host.

    Returns:
        Where each row's segments start [num_rows + 1], and the segments, in ascending order for each row.
    """
    lengths = bounds[:, 1] - bounds[:, 0]
    segments = torch.arange(len(bounds)).repeat_interleave(lengths)
    inside = torch.arange(len(segments)) - (lengths.cumsum(0) - lengths)[segments]
    rows = bounds[segments, 0] + inside
    if index is not None:
        rows = index[rows]
    counts = torch.bincount(rows, minlength=num_rows)
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    in_order = bool((rows.diff() >= 0).all())  # true if segments do not overlap; sorting takes milliseconds
    return begins, segments if in_order else segments[rows.argsort(stable=True)]


def _to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies from pinned memory; otherwise the host would wait for the copy."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
