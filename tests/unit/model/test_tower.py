"""The tower against transformers' own forward of the same weights: values, gradients, windows of all sizes."""

from collections.abc import Callable

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mirage_ds.batch import CELL_PATCHES, Grid
from mirage_ds.model.tower import Tower
from mirage_ds.model.windows import image_windows
from mirage_ds.self_check import noise, tiny_backbone

PATCH_VALUES = 1176
# A window has 4 x 4 merged patches. One image of one window; equal images; all sizes of windows, also cut ones.
GRIDS: list[list[Grid]] = [[(2, 3)], [(6, 4)] * 3, [(9, 5), (3, 3), (1, 1), (8, 8), (4, 12), (9, 5)]]


def patches(grids: list[Grid]) -> torch.Tensor:
    count = sum(rows * columns * CELL_PATCHES for rows, columns in grids)
    return noise(count * PATCH_VALUES, seed=1).float().reshape(count, PATCH_VALUES).requires_grad_()


def plain(visual: torch.nn.Module, pixel_values: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
    grid_thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids])
    output: torch.Tensor = visual(pixel_values, grid_thw=grid_thw).pooler_output
    return output


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    is_causal: bool,
) -> tuple[torch.Tensor, None]:
    """Attention as flash_attention_2 defines it: [1, H, P, head_dim] -> [1, P, H, head_dim]."""
    assert not is_causal
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    lengths = cu_seq_lens_q.diff().tolist()
    assert cu_seq_lens_k.diff().tolist() == lengths
    assert max_length_q == max_length_k == max(lengths)
    attended = [
        (q @ k.transpose(-1, -2) * scaling).softmax(dim=-1) @ v
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("grids", GRIDS, ids=["one", "equal", "all"])
def test_embeddings_and_gradients(grids: list[Grid], attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    visual = tiny_backbone().visual.requires_grad_(True)
    tower = Tower(visual, trained=True, attention=attention)
    inputs = patches(grids)
    parameters = [inputs, *visual.parameters()]

    def run(forward: Callable[..., torch.Tensor], *arguments: object) -> list[torch.Tensor]:
        output = forward(*arguments)
        weights = noise(output.numel(), seed=2).float().view_as(output)
        return [output.detach(), *torch.autograd.grad((output * weights).sum(), parameters)]

    for found, expected in zip(run(tower, inputs, grids), run(plain, visual, inputs, grids), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_frozen_tower_stores_nothing() -> None:
    output = Tower(tiny_backbone().visual, trained=False, attention="sdpa")(patches(GRIDS[0]), GRIDS[0])
    assert not output.requires_grad


def test_one_call_for_all_windows_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def count(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batches.append((query.shape[0], query.shape[2]))
        return attention(query, key, value)

    monkeypatch.setattr("mirage_ds.model.tower.scaled_dot_product_attention", count)
    Tower(tiny_backbone().visual, trained=False, attention="sdpa")(patches(GRIDS[2]), GRIDS[2])
    sizes = sorted(len(window) * CELL_PATCHES for grid in GRIDS[2] for window in image_windows(grid, 4))
    images = sorted(rows * columns * CELL_PATCHES for rows, columns in GRIDS[2])
    expected = [[(lengths.count(length), length) for length in sorted(set(lengths))] for lengths in (sizes, images)]
    assert batches == expected[0] + expected[1]
