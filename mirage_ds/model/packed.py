"""What keeps the samples of a packed row apart in attention: a mask for sdpa, cumulative lengths for FlashAttention.

Made once per micro-batch for all layers, without waiting for the device.

Shape legend: S samples, L columns of the row.
"""

from typing import Any

import torch

ALIGNMENT = 16  # elements; torch's memory-efficient attention takes masks with strides of 8 or 16 as they are


def apart(
    sample_ends: torch.Tensor, longest_sample: int, length: int, dtype: torch.dtype, attention: str
) -> dict[str, Any]:
    """The arguments of a decoder layer with which no sample attends to another.

    Args:
        sample_ends: [S] int32, ascending; the last one is L.
        longest_sample: tokens of the longest sample.
        length: L.
        dtype: of queries and keys.
        attention: "sdpa" or "flash_attention_2".
    """
    if len(sample_ends) == 1:
        return {"attention_mask": None}  # attention is causal by itself
    if attention != "flash_attention_2":
        return {"attention_mask": block_mask(sample_ends, length, dtype)}
    edges = torch.nn.functional.pad(sample_ends, (1, 0))
    limits = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    return {"attention_mask": None, **limits, "max_length_q": longest_sample, "max_length_k": longest_sample}


def block_mask(sample_ends: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores [1, 1, L, L]: 0 for a column of the same sample that is not later, else -infinity.

    It takes 2 L^2 bytes in bf16, 0.5 GiB for 16384 columns. A mask of bools would be half as large, but sdpa makes one
    of numbers of it in every layer and keeps that for backward. So it does on a GPU where rows of the mask do not begin
    at multiples of ALIGNMENT.
    """
    columns = torch.arange(length, dtype=sample_ends.dtype, device=sample_ends.device)
    sample = torch.bucketize(columns, sample_ends, right=True)
    seen = (columns <= columns[:, None]) & (sample == sample[:, None])
    aligned = torch.zeros(length, -(-length // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=seen.device)
    return aligned[:, :length].masked_fill_(~seen, -torch.inf)[None, None]
