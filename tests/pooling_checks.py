"""Checks of latent_pool for any device and implementation, against the definition in float64. tests/unit/ops,
tests/interpreted and tests/gpu call them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st

from mirage_ds.ops import latent_pool_definition as definition
from mirage_ds.ops.latent_pool import interprets, latent_pool
from mirage_ds.ops.segments import Segments, batch_segments

STRATEGIES = ("average", "average_all", "grid")
# Grids, K of each image, D. A tile of the kernel is 512 (16-bit) or 256 (float32) columns and 16 or 32 rows.
CASES = {
    "one image, D of two tiles and a bit": ([(3, 4)], [6], 515),
    "one patch per segment": ([(2, 3)], [6], 13),
    "ragged": ([(5, 5), (3, 9), (7, 7), (4, 4), (1, 1)], [4, 4, 6, 2, 1], 257),
    "segments of several tiles": ([(9, 10), (10, 11)], [1, 2], 3),
}


@st.composite
def images(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int]]:
    """Grids of one to four images, and for each a K that every strategy allows."""
    grids = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
    return grids, [draw(st.integers(1, rows)) * draw(st.integers(1, columns)) for rows, columns in grids]


@st.composite
def free_segments(draw: st.DrawFn) -> tuple[int, Segments]:
    """Number of patches, and segments that no strategy makes: overlapping, in any order, rows left out or repeated."""
    num_patches = draw(st.integers(1, 12))
    patch_index = draw(st.none() | st.lists(st.integers(0, num_patches - 1), min_size=1, max_size=15))
    length = num_patches if patch_index is None else len(patch_index)
    begins = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5))
    bounds = [[begin, draw(st.integers(begin + 1, length))] for begin in begins]
    return num_patches, Segments(torch.tensor(bounds), None if patch_index is None else torch.tensor(patch_index))


def patches_and_segments(grids: list[tuple[int, int]], latent_sizes: list[int], strategy: str) -> tuple[int, Segments]:
    """Number of patches and segments of images."""
    segments = batch_segments(grids, latent_sizes, strategy)
    assert segments is not None
    return sum(rows * columns for rows, columns in grids), segments


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """Fills new memory with NaN, so that elements that a kernel does not write are noticed."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ulps(ours: torch.Tensor, exact: torch.Tensor) -> int:
    """The largest distance between our and the rounded exact values, in representable numbers of a 16-bit dtype."""
    bits = [tensor.view(torch.int16).int() for tensor in (ours.cpu(), exact.to(ours.dtype).cpu())]
    places = [torch.where(number < 0, -(number & 0x7FFF), number) for number in bits]
    return int((places[0] - places[1]).abs().max())


def assert_as_exact_as(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """float32 to 1e-6; 16 bits to one unit in the last place, or to 1e-6 where a mean is so close to 0 that its unit is
    smaller than the error of float32 sums."""
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    else:
        far = (ours.double() - exact).abs() > 1e-6
        assert ulps(torch.where(far, ours, 0), torch.where(far, exact, 0)) <= 1


def check_forward(
    device: str, num_patches: int, segments: Segments, dim: int, dtype: torch.dtype, out_dtype: torch.dtype, seed: int
) -> None:
    """Compares all three outputs."""
    patch_embeds = torch.randn(num_patches, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    with poisoned_memory(device):
        inputs, targets, inverse_norms = latent_pool(patch_embeds, *segments, len(segments.bounds), out_dtype)
    assert (inputs.dtype, targets.dtype, inverse_norms.dtype) == (out_dtype, torch.float32, torch.float32)
    _, exact, exact_inverse_norms = definition.latent_pool(patch_embeds.double().cpu(), *segments, torch.float64)
    assert_as_exact_as(targets.cpu(), exact)
    assert_as_exact_as(inputs.cpu(), exact)
    # So that kept targets give the same inputs. Triton's interpreter alone cuts bits off where GPUs round to bf16.
    if out_dtype != torch.bfloat16 or not interprets():
        assert torch.equal(inputs, targets.to(out_dtype))
    torch.testing.assert_close(1 / inverse_norms.cpu().double(), 1 / exact_inverse_norms, rtol=1e-6, atol=1e-6)


def check_backward(
    device: str, num_patches: int, segments: Segments, dim: int, dtype: torch.dtype, out_dtype: torch.dtype, seed: int
) -> None:
    """Compares the gradient of all three outputs together with autograd of the definition in float64.

    Away from 0, where the gradient of an inverse norm is unbounded.
    """
    draw = torch.Generator().manual_seed(seed)
    patch_embeds = (torch.rand(num_patches, dim, generator=draw) + 0.5).to(device, dtype).requires_grad_()
    exact_embeds = patch_embeds.detach().double().cpu().requires_grad_()
    outputs = latent_pool(patch_embeds, *segments, len(segments.bounds), out_dtype)
    # Column-major, as autograd may pass them.
    grads = [torch.randn(output.T.shape, generator=draw).to(output).T for output in outputs[:2]]
    grads.append(torch.randn(len(outputs[2]), generator=draw).to(outputs[2]))
    exact_outputs = definition.latent_pool(exact_embeds, *segments, torch.float64)
    with poisoned_memory(device):
        (ours,) = torch.autograd.grad(outputs, patch_embeds, grads)
    (exact,) = torch.autograd.grad(exact_outputs, exact_embeds, [grad.double().cpu() for grad in grads])
    assert ours.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-5, atol=1e-5)
    else:
        largest = exact.abs().max().item()  # where terms cancel, the largest value bounds the error of float32 sums
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6 * largest)


def check_gradient_by_differences(device: str) -> None:
    """gradcheck, on segments that overlap and leave a row out. In float32 it needs large steps, which are accurate
    because the op is linear except for the norms."""
    segments = Segments(torch.tensor([[0, 3], [2, 4]]), torch.tensor([1, 0, 2, 4]))
    patch_embeds = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.autograd.gradcheck(
        lambda embeds: latent_pool(embeds, *segments, len(segments.bounds), torch.float32),
        (patch_embeds.to(device).requires_grad_(),),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-3,
    )


def check_zeros(device: str) -> None:
    """A black image: no division by zero, no gradient through its norm."""
    patch_embeds = torch.zeros(4, 5, device=device, requires_grad=True)
    _, targets, inverse_norms = latent_pool(patch_embeds, torch.tensor([[0, 2], [2, 4]]), None, 2, torch.bfloat16)
    assert not targets.any()
    torch.testing.assert_close(inverse_norms.cpu(), torch.full((2,), 1 / definition.EPS))
    inverse_norms.sum().backward()
    assert patch_embeds.grad is not None
    assert not patch_embeds.grad.any()


def check_op(device: str) -> None:
    """torch.library's own checks: schema, autograd, fake tensors, tracing with dynamic shapes."""
    num_patches, segments = patches_and_segments([(3, 4), (2, 2)], [4, 2], "grid")
    patch_embeds = torch.randn(num_patches, 5, device=device, requires_grad=True)
    torch.library.opcheck(latent_pool, (patch_embeds, *segments, 6, torch.bfloat16))


def check_compile(device: str, backend: str) -> None:
    """One graph without breaks gives the same numbers, forward and backward, also for other shapes afterwards."""
    compiled = torch.compile(
        lambda embeds, bounds, index: latent_pool(embeds * 2, bounds, index, bounds.shape[0], torch.float32)[0].sin(),
        backend=backend,
        fullgraph=True,
    )
    for grids, latent_sizes in (([(3, 4)], [4]), ([(2, 3), (4, 4)], [2, 4]), ([(5, 6)], [6])):
        num_patches, segments = patches_and_segments(grids, latent_sizes, "grid")
        patch_embeds = torch.randn(num_patches, 7, device=device, requires_grad=True)
        output = compiled(patch_embeds, *segments)
        expected = latent_pool(patch_embeds * 2, *segments, len(segments.bounds), torch.float32)[0].sin()
        torch.testing.assert_close(output, expected)
        (grad,), (expected_grad,) = (torch.autograd.grad(value.sum(), patch_embeds) for value in (output, expected))
        torch.testing.assert_close(grad, expected_grad)
