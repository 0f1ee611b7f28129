"""The digest of an adapter's base."""

from collections.abc import Sequence

import pytest
import torch

from mirage_ds.checkpoint.base import ROW, element_sum


def mixed(number: int) -> int:
    """The finalizer of SplitMix64 of `number` + 1 golden steps, as an odd number of 64 bits, in Python's integers."""
    value = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) | 1


def plain_sum(bits: Sequence[int], begin: int) -> int:
    columns, total = [mixed(column) for column in range(ROW)], 0
    for place, value in enumerate(bits, begin):
        total += value * columns[place % ROW] * mixed(place // ROW + ROW)
    return total % 2**64


@pytest.mark.parametrize(("dtype", "integer"), [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_sums_are_those_of_plain_integers(dtype: torch.dtype, integer: torch.dtype) -> None:
    """Of a parameter of several rows, and of its parts, wherever they are cut."""
    weight = torch.randn(2 * ROW + 1234, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = element_sum(weight)
    assert whole == plain_sum(weight.view(integer).tolist(), 0)
    for cut in (1, ROW - 1, ROW, ROW + 77):
        parts = element_sum(weight[:cut]), element_sum(weight[cut:], cut)
        assert sum(parts) % 2**64 == whole
        assert parts[1] == plain_sum(weight[cut:].view(integer).tolist(), cut)
    assert element_sum(weight.flip(0)) != whole
