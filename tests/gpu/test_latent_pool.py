"""The compiled kernels on a GPU: the checks of tests/interpreted, on other random inputs in each run."""

import random

import pooling_checks as checks
import pytest
import torch

from mirage_ds.ops import latent_pool_definition as definition
from mirage_ds.ops.latent_pool import DTYPES, describe_path, latent_pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the kernels run interpreted here")


@pytest.fixture
def seed() -> int:
    """Different in each run; pytest shows it when a test fails."""
    drawn = random.SystemRandom().randrange(2**31)
    print(f"seed {drawn}")
    return drawn


def test_the_start_message_says_compiled() -> None:
    assert describe_path(torch.device("cuda")).endswith("kernels on cuda, compiled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", checks.STRATEGIES)
@pytest.mark.parametrize("name", checks.CASES)
def test_forward_and_backward(name: str, strategy: str, dtype: torch.dtype, seed: int) -> None:
    grids, latent_sizes, dim = checks.CASES[name]
    case = checks.patches_and_segments(grids, latent_sizes, strategy)
    checks.check_forward("cuda", *case, dim, dtype, dtype, seed)
    checks.check_backward("cuda", *case, dim, dtype, dtype, seed)


@pytest.mark.parametrize("dim", [2048, 3584, 5120, 8192])
@pytest.mark.parametrize("strategy", checks.STRATEGIES)
def test_real_sizes(strategy: str, dim: int, seed: int) -> None:
    draw = random.Random(seed)
    grids = [(draw.randint(8, 36), draw.randint(8, 36)) for _ in range(20)]
    case = checks.patches_and_segments(grids, [draw.choice((2, 4, 8, 16)) for _ in grids], strategy)
    checks.check_forward("cuda", *case, dim, torch.bfloat16, torch.bfloat16, seed)
    checks.check_backward("cuda", *case, dim, torch.bfloat16, torch.bfloat16, seed)


@pytest.mark.parametrize("strategy", checks.STRATEGIES)
def test_300_images(strategy: str, seed: int) -> None:
    case = checks.patches_and_segments([(1 + n % 3, 1 + n % 2) for n in range(300)], [1] * 300, strategy)
    checks.check_forward("cuda", *case, 64, torch.float32, torch.bfloat16, seed)


def test_offsets_beyond_31_bits() -> None:
    """4.3 GB of embeddings, with one segment in the last rows."""
    dim, num_patches = 8192, 2**18 + 8
    patch_embeds = torch.zeros(num_patches, dim, dtype=torch.bfloat16, device="cuda")
    patch_embeds[-8:] = torch.arange(8, device="cuda")[:, None]
    bounds = torch.tensor([[num_patches - 8, num_patches], [0, 8]])
    _, targets, _ = latent_pool(patch_embeds, bounds, None, 2, torch.bfloat16)
    assert targets[0].eq(3.5).all()
    assert not targets[1].any()


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_op() -> None:
    checks.check_zeros("cuda")
    checks.check_gradient_by_differences("cuda")
    checks.check_op("cuda")


def test_compile() -> None:
    checks.check_compile("cuda", backend="inductor")


def test_bounds_on_the_gpu_are_refused() -> None:
    bounds = torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match=r"bounds is torch.int64 on cuda:0 .*int64 on the CPU"):
        latent_pool(torch.zeros(2, 2, device="cuda"), bounds.cuda(), None, 1, torch.float32)


def test_no_wait_for_the_device() -> None:
    """Neither the checks nor the copies of bounds and index synchronize."""
    num_patches, segments = checks.patches_and_segments([(18, 18)] * 4, [4] * 4, "grid")
    patch_embeds = torch.randn(num_patches, 256, device="cuda", requires_grad=True)
    latent_pool(patch_embeds, *segments, 16, torch.bfloat16)[1].sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = latent_pool(patch_embeds, *segments, 16, torch.bfloat16)
        outputs[1].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = definition.latent_pool(patch_embeds.detach().cpu(), *segments, torch.bfloat16)
    torch.testing.assert_close(outputs[1].cpu(), expected[1])
