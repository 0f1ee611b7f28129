"""The package flash-attn in plain torch, as transformers calls it: what its two functions define, on any device.

Causal attention is aligned at the bottom right: the last query sees all keys.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import modeling_flash_attention_utils as flash_utils

from mirage_ds.model.mirage import MirageModel

FLASH = "flash_attention_2"
VARLEN, DENSE = "flash_attn_varlen_func", "flash_attn_func"


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    """[B, Q, H, d], keys and values [B, S, H of them, d] -> [B, Q, H, d]."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    scores = torch.einsum("bqhd,bshd->bhqs", query, key) * (scale or query.shape[-1] ** -0.5)
    if causal:
        num_queries, num_keys = scores.shape[-2:]
        seen = torch.ones(num_queries, num_keys).tril(num_keys - num_queries).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqs,bshd->bqhd", scores.softmax(dim=-1), value)


class FlashAttn:
    """Counts the calls of each function."""

    def __init__(self) -> None:
        self.calls = {DENSE: 0, VARLEN: 0}

    def dense(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        """[B, Q, H, d] -> the same."""
        self.calls[DENSE] += 1
        assert dropout_p == 0.0
        assert window_size == (-1, -1)
        return attention(q, k, v, softmax_scale, causal)

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        """[tokens, H, d] of sequences one after the other -> the same."""
        self.calls[VARLEN] += 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        with _disable_current_modes():  # the kernel reads the lengths on the device
            lengths = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
            assert (int(max_seqlen_q), int(max_seqlen_k)) == tuple(map(max, lengths))
        parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([attention(*(part[None] for part in each), softmax_scale, causal)[0] for each in parts])


def install(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    """Lets transformers import the stub as flash-attn, for one test."""
    stub = FlashAttn()
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = stub.dense, stub.varlen
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return stub


def use_flash(model: MirageModel) -> None:
    """As `load_backbone` with this attention, which transformers refuses without a GPU."""
    model.tower.attention = model.rollout.attention = FLASH
    model.hf.config._attn_implementation = FLASH
