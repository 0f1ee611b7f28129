"""The segments of images: each strategy against its rule, implemented differently."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from pooling_checks import images, patches_and_segments

from mirage_ds.ops import latent_pool_definition as definition
from mirage_ds.ops.segments import batch_segments, grid_shape

Images = tuple[list[tuple[int, int]], list[int]]


def rows_of_images(case: Images, strategy: str) -> list[list[list[int]]]:
    """For each image, for each of its latents, the patches counted from the image's first."""
    grids, latent_sizes = case
    num_patches, (bounds, index) = patches_and_segments(grids, latent_sizes, strategy)
    index = torch.arange(num_patches) if index is None else index
    rows = iter([index[begin:end].tolist() for begin, end in bounds.tolist()])
    first, found = 0, []
    for (height, width), size in zip(grids, latent_sizes, strict=True):
        found.append([[row - first for row in next(rows)] for _ in range(size)])
        first += height * width
    assert next(rows, None) is None
    return found


@given(case=images())
def test_average_takes_equal_segments_and_drops_the_remainder(case: Images) -> None:
    for (height, width), segments in zip(case[0], rows_of_images(case, "average"), strict=True):
        run = height * width // len(segments)
        assert [len(segment) for segment in segments] == [run] * len(segments)
        assert list(chain(*segments)) == list(range(run * len(segments)))


@given(case=images())
def test_average_all_takes_every_patch_once(case: Images) -> None:
    for (height, width), segments in zip(case[0], rows_of_images(case, "average_all"), strict=True):
        assert list(chain(*segments)) == list(range(height * width))
        lengths = {len(segment) for segment in segments}
        assert max(lengths) - min(lengths) <= 1


@given(case=images())
def test_grid_is_adaptive_average_pooling(case: Images) -> None:
    num_patches, segments = patches_and_segments(*case, "grid")
    patch_embeds = torch.randn(num_patches, 2, dtype=torch.float64)
    _, pooled, _ = definition.latent_pool(patch_embeds, *segments, torch.float64)
    expected, first = [], 0
    for (height, width), size in zip(*case, strict=True):
        plane = patch_embeds[first : first + height * width].T.reshape(2, height, width)
        cells = torch.nn.functional.adaptive_avg_pool2d(plane, grid_shape(height, width, size))
        expected.append(cells.flatten(1).T)
        first += height * width
    torch.testing.assert_close(pooled, torch.cat(expected))


@pytest.mark.parametrize(
    ("rows", "columns", "latent_size", "shape"),
    [
        (18, 18, 4, (2, 2)),
        (18, 18, 6, (2, 3)),  # as square as (3, 2)
        (10, 20, 8, (2, 4)),
        (20, 10, 8, (4, 2)),
        (30, 5, 6, (6, 1)),
        (3, 4, 12, (3, 4)),
        (2, 9, 4, (1, 4)),  # (4, 1) has more rows than the image
        (5, 5, 1, (1, 1)),
    ],
)
def test_cells_are_nearly_square(rows: int, columns: int, latent_size: int, shape: tuple[int, int]) -> None:
    assert grid_shape(rows, columns, latent_size) == shape


@pytest.mark.parametrize(
    ("latent_size", "strategy", "message"),
    [
        (26, "average", "25 merged patches for 26 latents"),
        (26, "average_all", "25 merged patches for 26 latents"),
        (26, "grid", "25 merged patches for 26 latents"),
        (0, "average", "25 merged patches for 0 latents"),
        (7, "grid", "no grid of 7 cells fits the helper image's 5 x 5 merged patches"),
    ],
)
def test_what_cannot_be_pooled(latent_size: int, strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_segments([(5, 5)], [latent_size], strategy)


def test_no_image() -> None:
    assert batch_segments([], [], "average") is None
