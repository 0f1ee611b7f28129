"""The pooling definition against the sum written out in float64, and its refusals."""

import pytest
import torch

from mirage_ds.ops.latent_pool import latent_pool


@pytest.mark.parametrize(
    ("num_patches", "latent_sizes"),
    [([25], [4]), ([27, 49, 16], [4, 4, 8]), ([5, 1, 7], [5, 1, 2]), ([], [])],
    ids=["remainder", "ragged", "one patch each", "no image"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_equal_runs(num_patches: list[int], latent_sizes: list[int], dtype: torch.dtype) -> None:
    embeds = torch.randn(sum(num_patches), 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, start = [], 0
    for patches, size in zip(num_patches, latent_sizes, strict=True):
        run = patches // size
        for k in range(size):
            rows = [embeds[start + k * run + i].double() for i in range(run)]
            expected.append(sum(rows) / run)
        start += patches
    pooled = latent_pool(embeds, num_patches, latent_sizes)
    assert pooled.dtype == torch.float32
    assert pooled.shape == (sum(latent_sizes), 6)
    if expected:
        torch.testing.assert_close(pooled.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_patches", "latent_sizes"), [([4], [5]), ([4], [0]), ([3], [2]), ([4], [2, 2])])
def test_numbers_that_do_not_fit(num_patches: list[int], latent_sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="K"):
        latent_pool(torch.zeros(4, 2), num_patches, latent_sizes)
