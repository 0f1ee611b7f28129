"""The Triton kernels, interpreted: against the definition in float64, and against the reference's own targets."""

from collections.abc import Callable

import golden_set
import pooling_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_ds.data.collate import collate
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.targets import latent_targets
from mirage_ds.model.tower import Tower
from mirage_ds.ops import latent_pool_definition as definition
from mirage_ds.ops import latent_pool_kernel
from mirage_ds.ops.latent_pool import DTYPES, describe_path, takes_kernel
from mirage_ds.ops.segments import Segments

Images = tuple[list[tuple[int, int]], list[int]]
dtypes = st.sampled_from(DTYPES)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' launchers that a test has called."""
    seen: list[str] = []

    def watched(name: str) -> Callable[..., object]:
        launcher = getattr(latent_pool_kernel, name)

        def launch(*arguments: object) -> object:
            seen.append(name)
            return launcher(*arguments)

        return launch

    for name in ("pool", "mean_backward"):
        monkeypatch.setattr(latent_pool_kernel, name, watched(name))
    return seen


def test_the_start_message_says_interpreted() -> None:
    assert takes_kernel(torch.device("cpu"))
    assert describe_path(torch.device("cpu")).endswith("kernels on cpu, interpreted")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["average", "grid"])
@pytest.mark.parametrize("name", checks.CASES)
def test_forward_and_backward(launches: list[str], name: str, strategy: str, dtype: torch.dtype) -> None:
    """Without an index and with one; the test below draws every strategy."""
    grids, latent_sizes, dim = checks.CASES[name]
    case = checks.patches_and_segments(grids, latent_sizes, strategy)
    checks.check_forward("cpu", *case, dim, dtype, dtype, seed=0)
    checks.check_backward("cpu", *case, dim, dtype, dtype, seed=0)
    assert launches == ["pool", "pool", "mean_backward"]


@pytest.mark.parametrize("strategy", ["average", "grid"])
def test_300_images(strategy: str) -> None:
    segments = checks.patches_and_segments([(1 + n % 3, 1 + n % 2) for n in range(300)], [1] * 300, strategy)
    checks.check_forward("cpu", *segments, 3, torch.float32, torch.bfloat16, seed=0)


@settings(max_examples=25)
@given(case=checks.images(), strategy=st.sampled_from(checks.STRATEGIES), dim=st.integers(1, 20), dtype=dtypes)
def test_forward_of_any_images(case: Images, strategy: str, dim: int, dtype: torch.dtype) -> None:
    checks.check_forward("cpu", *checks.patches_and_segments(*case, strategy), dim, dtype, torch.bfloat16, seed=1)


@settings(max_examples=25)
@given(case=checks.free_segments(), dim=st.integers(1, 9), dtype=dtypes, out_dtype=dtypes)
def test_any_segments(case: tuple[int, Segments], dim: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    checks.check_forward("cpu", *case, dim, dtype, out_dtype, seed=2)
    checks.check_backward("cpu", *case, dim, dtype, out_dtype, seed=2)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradient_by_differences() -> None:
    checks.check_gradient_by_differences("cpu")


def test_zeros() -> None:
    checks.check_zeros("cpu")


def test_op() -> None:
    checks.check_op("cpu")


def test_compile() -> None:
    checks.check_compile("cpu", backend="aot_eager")


def test_targets_of_the_reference(launches: list[str]) -> None:
    """The golden set's targets, to its tolerance; and to 1e-6 the definition on the same embeddings."""
    tower = Tower(load_backbone(golden_set.MODEL, dtype=torch.float32).visual, trained=False, attention="sdpa")
    for sample in golden_set.samples():
        index = sample["index"]
        batch = collate([golden_set.encoded(index, "stage1")], align_latents=False)
        _, helper_embeds = tower.encode(batch)
        latents = latent_targets(helper_embeds, batch, "average", torch.float32)
        stored = golden_set.tensors("golden")[f"{index}.stage1.targets"]
        assert (latents.targets - stored).abs().max() < 1e-4 * stored.abs().max()
        bounds = checks.patches_and_segments(batch.helper_grids, batch.latent_sizes, "average")[1].bounds
        expected = definition.latent_pool(helper_embeds, bounds, None, torch.float32)
        for ours, theirs in zip(latents, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len(launches) == len(golden_set.samples())
