"""latent_pool on the CPU against the definition in float64, its errors, and its choice of implementation.

The kernels are tested in tests/interpreted and tests/gpu.
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pooling_checks as checks
import pytest
import torch

from mirage_ds.errors import ConfigError
from mirage_ds.ops import latent_pool as ops
from mirage_ds.ops.latent_pool import DTYPES, describe_path, latent_pool
from mirage_ds.ops.segments import Segments

CPU = torch.device("cpu")
BOUNDS = torch.tensor([[0, 2], [2, 4]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", checks.STRATEGIES)
@pytest.mark.parametrize("name", checks.CASES)
def test_forward_and_backward(name: str, strategy: str, dtype: torch.dtype) -> None:
    grids, latent_sizes, dim = checks.CASES[name]
    case = checks.patches_and_segments(grids, latent_sizes, strategy)
    checks.check_forward("cpu", *case, dim, dtype, torch.bfloat16, seed=0)
    checks.check_backward("cpu", *case, dim, dtype, torch.bfloat16, seed=0)


def test_segments_overlap() -> None:
    case = (5, Segments(torch.tensor([[0, 3], [1, 6]]), torch.tensor([4, 4, 0, 2, 2, 1])))
    checks.check_forward("cpu", *case, 6, torch.float32, torch.float16, seed=0)
    checks.check_backward("cpu", *case, 6, torch.float32, torch.float16, seed=0)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_op() -> None:
    checks.check_zeros("cpu")
    checks.check_gradient_by_differences("cpu")
    checks.check_op("cpu")
    checks.check_compile("cpu", backend="aot_eager")


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors use the kernels, and any launch fails the test."""

    def kernels() -> ModuleType:
        raise AssertionError("launched")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "_kernels", kernels)


@pytest.mark.parametrize(
    ("patch_embeds", "bounds", "index", "num_latents", "out_dtype", "message"),
    [
        pytest.param(
            torch.zeros(4, 2), torch.tensor([[0, 5]]), None, 1, torch.float32, r"\[0, 5\] .* end <= 4", id="end"
        ),
        pytest.param(torch.zeros(4, 2), torch.tensor([[-1, 2]]), None, 1, torch.float32, r"are \[-1, 2\]", id="begin"),
        pytest.param(
            torch.zeros(4, 2),
            torch.tensor([[0, 1], [2, 2]]),
            None,
            2,
            torch.float32,
            r"are \[2, 2\]",
            id="empty segment",
        ),
        pytest.param(
            torch.zeros(4, 2),
            BOUNDS,
            torch.tensor([0, 1, 2]),
            2,
            torch.float32,
            r"\[2, 4\] .* end <= 3",
            id="end in index",
        ),
        pytest.param(
            torch.zeros(4, 2),
            BOUNDS,
            torch.tensor([0, 1, 2, 4]),
            2,
            torch.float32,
            r"index .* rows 0 \.\. 3",
            id="index",
        ),
        pytest.param(torch.zeros(4, 2), BOUNDS, None, 3, torch.float32, r"\[2, 2\] for 3 latents", id="number"),
        pytest.param(
            torch.zeros(4, 2),
            torch.empty(0, 2, dtype=torch.int64),
            None,
            0,
            torch.float32,
            "leave out the call where there is no helper image",
            id="empty batch",
        ),
        pytest.param(
            torch.zeros(2, 4).T, BOUNDS, None, 2, torch.float32, r"strides \[1, 4\].*contiguous", id="strides"
        ),
        pytest.param(torch.zeros(4), BOUNDS, None, 2, torch.float32, r"shape \[4\].*\[P, D\]", id="shape"),
        pytest.param(torch.zeros(4, 2).double(), BOUNDS, None, 2, torch.float32, "torch.float64 and", id="dtype"),
        pytest.param(torch.zeros(4, 2), BOUNDS, None, 2, torch.int32, "and torch.int32", id="output dtype"),
        pytest.param(torch.zeros(4, 2), BOUNDS.int(), None, 2, torch.float32, "bounds is torch.int32", id="bounds"),
        pytest.param(
            torch.zeros(4, 2),
            torch.tensor([[0, 2], [2, 4]]).T,
            None,
            2,
            torch.float32,
            r"bounds .* strides \[1, 2\].*contiguous int64",
            id="bounds' strides",
        ),
        pytest.param(
            torch.zeros(4, 2),
            BOUNDS,
            torch.arange(8)[::2],
            2,
            torch.float32,
            r"index .* strides \[2\].*contiguous int64",
            id="index' strides",
        ),
    ],
)
def test_refused_before_launch(
    no_launch: None,
    patch_embeds: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor | None,
    num_latents: int,
    out_dtype: torch.dtype,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        latent_pool(patch_embeds, bounds, index, num_latents, out_dtype)
    with pytest.raises(AssertionError, match="launched"):
        latent_pool(torch.zeros(4, 2), BOUNDS, None, 2, torch.float32)


def test_a_wrong_device_is_refused() -> None:
    """Calls the check itself: with a tensor on `meta`, the op would only run the fake for shapes."""
    patch_embeds = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"patch_embeds are on meta .*CUDA GPU; move them there"):
        ops._check(patch_embeds.to("meta"), BOUNDS, None, 2, torch.float32)
    with pytest.raises(ValueError, match=r"bounds is torch.int64 on meta .*int64 on the CPU"):
        ops._check(patch_embeds, BOUNDS.to("meta"), None, 2, torch.float32)
    with pytest.raises(ValueError, match=r"index is torch.int64 on meta"):
        ops._check(patch_embeds, BOUNDS, torch.arange(4).to("meta"), 2, torch.float32)


def test_which_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU tensors need triton; without it there is an error, no silent fallback."""
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert describe_path(CPU) == "latent_pool: plain torch on cpu"
    assert latent_pool(torch.ones(4, 2), BOUNDS, None, 2, torch.float32)[1].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ConfigError, match=r"triton is missing.*pip install triton=="):
        describe_path(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for value in ("1", "true"):  # Triton takes both
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(ConfigError, match=r"triton is missing"):
            latent_pool(torch.ones(4, 2), BOUNDS, None, 2, torch.float32)


def test_the_remedy_names_the_tested_triton() -> None:
    assert ops.TESTED_TRITON in (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()


def test_benchmark_runs() -> None:
    """Small and on the CPU: its results are checked against float64, its times mean nothing."""
    script = Path(__file__).parents[3] / "benchmarks" / "latent_pool.py"
    run = subprocess.run([sys.executable, str(script), "--device", "cpu", "--small"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| 2 x mixed | 64 | bfloat16 |" in run.stdout
