"""The rollout: decoder stack, final norm and loss head as one module; one pass over a sequence, or several.

A recurrent rollout (stage 2) feeds hidden states back: the input of a latent is the final-normed hidden state of the
position before it. The columns of a micro-batch are therefore split before every column in which any row has a latent,
and each part is one pass that attends to the keys and values of all earlier parts:

    columns   0 ........ s | s+1 | s+2 | s+3 ...... L      K = 3 latents at s+1, s+2, s+3: K + 1 = 4 passes

Further blocks split their columns likewise. In a column with a latent in one row and text or padding in another, each
row has its own input: rows may differ in their number of blocks, in K, and in where their blocks lie. Before a column
with a latent, the row has the token before it (see Batch), whose state is fed back.

Without fed-back states, several samples may be packed into one row: see packed.py.

Shape legend: B rows, L columns, Q columns of one pass, D hidden, H key-value heads, T supervised tokens, S samples.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mirage_ds.model.losses import LossHead
from mirage_ds.model.packed import apart
from mirage_ds.model.parts_cache import KeyValue, PartsCache, remade_hooks
from mirage_ds.model.weight_gradients import DeferredGradient, deferred_gradients, deferring


class Rollout(torch.nn.Module):
    """Inputs -> hidden states and the cross-entropy of the supervised tokens.

    Under ZeRO-3 it is either one leaf module (gathered as one, whatever the number of passes, which may then differ
    between ranks) or gathered layer by layer.
    """

    def __init__(
        self,
        layers: torch.nn.ModuleList,
        norm: torch.nn.Module,
        rotary_emb: torch.nn.Module,
        head: LossHead,
        *,
        recurrent: bool,
        recompute: bool,
        attention: str,
    ) -> None:
        """
        Args:
            layers, norm, rotary_emb: transformers' own modules.
            recurrent: feed hidden states back at the latents (stage 2).
            recompute: activation checkpointing, separately for each layer of each pass. A pass of one column without
                a mask is not recomputed: what it stores is small, and recomputing it would read all weights once more.
            attention: "sdpa" or "flash_attention_2".
        """
        super().__init__()
        self.layers, self.norm, self.rotary_emb, self.head = layers, norm, rotary_emb, head
        self.recurrent, self.recompute, self.attention = recurrent, recompute, attention
        self.deferred = [deferred_gradients(layer) if recurrent else [] for layer in layers]

    def num_passes(self, latent_columns: Sequence[int]) -> int:
        """How many passes a micro-batch with latents in these columns takes."""
        return 1 + len(latent_columns) if self.recurrent else 1

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        latent_mask: torch.Tensor,
        latent_columns: Sequence[int],
        target_rows: torch.Tensor,
        target_ids: torch.Tensor,
        num_passes: int | None = None,
        sample_ends: torch.Tensor | None = None,
        longest_sample: int = 0,
        *,
        store_columns: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            inputs_embeds: [B, L, D]; must require grad, or ZeRO-3's backward does not enter a leaf module.
            position_ids: [3, B, L].
            attention_mask: [B, L] bool; None if no row has padding before one of its tokens, see `pass_mask`.
            latent_mask: [B, L] bool.
            latent_columns: ascending columns of latents, none of them 0.
            target_rows, target_ids: [T], see Batch.
            num_passes: make this many passes (at least `self.num_passes(latent_columns)`, at most L); for ZeRO-3
                ranks that gather layer by layer and must agree. The extra splits are at the end and change nothing.
            sample_ends: [S] int32, where the samples of one packed row end, see Batch; None: rows are not packed.
            longest_sample: tokens of the longest packed sample; a number on the host.
            store_columns: do not recompute passes over one column without a mask. Not where ranks agree on
                `num_passes`: they gather inside the passes, so they must also recompute the same ones.

        Returns:
            Hidden states after the final norm [B, L, D], and cross-entropies [T] float32.
        """
        for deferred in chain.from_iterable(self.deferred):
            deferred.columns.clear()  # of a backward that did not come to its end
        length = inputs_embeds.shape[1]
        packed: dict[str, Any] | None = None
        if sample_ends is not None:
            if self.recurrent or len(inputs_embeds) != 1:
                raise RuntimeError("samples can share one row, and only where no hidden state is fed back")
            packed = apart(sample_ends, longest_sample, length, inputs_embeds.dtype, self.attention)
        splits = set(latent_columns) if self.recurrent else set()
        spare = (column for column in range(length - 1, 0, -1) if column not in splits)
        splits |= {next(spare) for _ in range((num_passes or 0) - 1 - len(splits))}

        # [B, L, head dimension], or with a first dimension of 3 where the layers combine the rows of position_ids.
        cos, sin = self.rotary_emb(inputs_embeds, position_ids)
        past: list[list[KeyValue]] = [[] for _ in self.layers]
        hidden: list[torch.Tensor] = []
        for start, end in pairwise([0, *sorted(splits), length]):
            inputs = inputs_embeds[:, start:end]
            if hidden:
                first = torch.where(latent_mask[:, start, None, None], hidden[-1][:, -1:], inputs[:, :1])
                inputs = torch.cat([first, inputs[:, 1:]], dim=1)
            seen = packed or {"attention_mask": self.pass_mask(attention_mask, start, end, inputs.device)}
            rotary = (cos[..., start:end, :], sin[..., start:end, :])
            column = end == start + 1
            # With a mask, attention may store copies of all keys and values, such as repeated or unpadded ones.
            stored = column and store_columns and seen["attention_mask"] is None
            recompute = self.recompute and not stored
            hidden.append(self.one_pass(inputs, past, rotary, seen, recompute=recompute, deferred=column and start > 0))
            self.check_cache(past, end)

        hidden_states = torch.cat(hidden, dim=1)
        return hidden_states, self.head(hidden_states.flatten(0, 1)[target_rows], target_ids)

    def one_pass(
        self,
        hidden: torch.Tensor,
        past: list[list[KeyValue]],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        seen: dict[str, Any],
        *,
        recompute: bool,
        deferred: bool,
    ) -> torch.Tensor:
        """Inputs [B, Q, D] -> final-normed hidden states [B, Q, D]; appends this pass's part to every layer's past.

        Args:
            seen: the layers' arguments that say what the columns may attend to.
        """
        for layer, parts, gradients in zip(self.layers, past, self.deferred, strict=True):
            arguments = (layer, hidden, tuple(parts), position_embeddings, seen, gradients if deferred else [])
            if recompute:
                # No layer draws random numbers, whose state would be read from the device in each layer and pass.
                hidden, key_value = checkpoint(run_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, key_value = run_layer(*arguments, remade=True)
            parts.append(key_value)
        return self.norm(hidden)

    def check_cache(self, past: list[list[KeyValue]], columns: int) -> None:
        """Raises if the cache lacks columns: a pass that does not see all earlier ones would be silently wrong."""
        for index, parts in enumerate(past):
            held = sum(key.shape[2] for key, _ in parts)
            if held != columns:
                raise RuntimeError(f"the KV cache of layer {index} holds {held} of {columns} columns")

    def pass_mask(
        self, attention_mask: torch.Tensor | None, start: int, end: int, device: torch.device
    ) -> torch.Tensor | None:
        """What the columns [start, end) may attend to, in the form that the attention implementation expects.

        Nothing attends to padding that comes after all tokens of its row. So without other padding no mask is needed
        where attention is causal by itself: FlashAttention aligns the last query with the last key; SDPA the first
        query with the first key, which is the same in the first pass, and for a single query.

        With a mask, FlashAttention gets the tokens of each row alone, wherever its padding lies: its last queries are
        its last keys. A row may have no query. In a pass of one column every row has one, also where it is padding,
        whose output nothing uses; by then every row has tokens, so that it has keys.
        """
        flash = self.attention == "flash_attention_2"
        columns = torch.arange(end, device=device)
        queries = columns[start:, None]
        if attention_mask is None:
            exact = flash or start == 0 or end == start + 1
            return None if exact else (columns <= queries)[None, None]  # [1, 1, Q, end]
        if flash:
            return attention_mask[:, :end]
        # Padding attends to itself: a softmax over no entries would be NaN.
        seen = ((columns <= queries) & attention_mask[:, None, :end]) | (columns == queries)
        return seen[:, None]  # [B, 1, Q, end]


def run_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    past: Sequence[KeyValue],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    seen: dict[str, Any],
    deferred: Sequence[DeferredGradient],
    *,
    remade: bool = False,
) -> tuple[torch.Tensor, KeyValue]:
    """One decoder layer over [B, Q, D] and its past parts -> its output and this pass's keys and values.

    Args:
        seen: see `one_pass`.
        deferred: of which the gradient is left for later, see `DeferredGradient`.
        remade: see `Remade`; activation checkpointing stores nothing in any case.
    """
    cache = PartsCache(past)
    with deferring(deferred), remade_hooks(layer, cache) if remade else nullcontext():
        output = layer(hidden, **seen, position_embeddings=position_embeddings, past_key_values=cache, use_cache=True)
    if cache.new is None:
        raise RuntimeError("the decoder layer did not use the KV cache")
    cache.joined = ()
    return output, cache.new
