"""The rollout: decoder stack, final norm and loss head as one module; one pass over a sequence, or several.

A recurrent rollout (stage 2) feeds hidden states back: the input of a latent is the final-normed hidden state of the
position before it. The columns of a micro-batch are therefore split before every column in which any row has a latent,
and each part is one pass that attends to the keys and values of all earlier parts:

    columns   0 ........ s | s+1 | s+2 | s+3 ...... L      K = 3 latents at s+1, s+2, s+3: K + 1 = 4 passes

Further blocks split their columns likewise. In a column with a latent in one row and text or padding in another, each
row has its own input: rows may differ in their number of blocks, in K, and in where their blocks lie. Before a column
with a latent, the row has the token before it (see Batch), whose state is fed back.

In any stage, a pass also begins where the images of a row are hidden, as all columns of a pass have the same keys.

Without fed-back states and hidden images, several samples may be packed into one row: see packed.py.

Shape legend: B rows, L columns, Q columns of one pass, D hidden, H key-value heads, T supervised tokens, S samples.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mirage_ds.batch import Batch
from mirage_ds.model.layer_groups import Gathering, Visit, visits
from mirage_ds.model.losses import LossHead
from mirage_ds.model.packed import apart
from mirage_ds.model.parts_cache import KeyValue, PartsCache, remade_hooks
from mirage_ds.model.pass_mask import pass_mask
from mirage_ds.model.weight_gradients import DeferredGradient, deferred_gradients, deferring


class Rollout(torch.nn.Module):
    """Inputs -> hidden states and the cross-entropy of the supervised tokens.

    Under ZeRO-3 it is either one leaf module (gathered as one, whatever the number of passes, which may then differ
    between ranks), or gathered layer by layer in a single pass, or in several passes by groups of layers, see `divide`.
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
        self.groups, self.divided = [slice(0, len(layers))], False
        self.gathering: Gathering | None = None

    def divide(self, group_layers: int) -> None:
        """Divides the layers into groups of so many, which `gathering` gathers and releases inside the passes.

        So that no whole gradient of a layer waits for its first pass, which is differentiated last, all other passes
        then leave the gradients of its matrices for later (see `DeferredGradient`), whatever their columns.
        """
        starts, self.divided = range(0, len(self.layers), group_layers), True
        self.groups = [slice(start, start + group_layers) for start in starts]
        self.deferred = [
            found or deferred_gradients(layer) for found, layer in zip(self.deferred, self.layers, strict=True)
        ]

    def grouped_layers(self) -> list[torch.nn.ModuleList]:
        """The layers of each group."""
        return [self.layers[group] for group in self.groups]

    def starts(self, batch: Batch) -> set[int]:
        """The columns that begin a pass, besides the first one."""
        return {*batch.hide_columns, *(batch.latent_columns if self.recurrent else [])}

    def num_passes(self, batch: Batch) -> int:
        """How many passes a micro-batch takes."""
        return 1 + len(self.starts(batch))

    def forward(
        self, inputs_embeds: torch.Tensor, *, batch: Batch, num_passes: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            inputs_embeds: [B, L, D]; must require grad, or ZeRO-3's backward does not enter a leaf module.
            batch: by name, as ZeRO-3's hooks look for tensors in positional arguments, and warn of other types.
            num_passes: make this many passes (at least `self.num_passes(batch)`, at most L); for ZeRO-3 ranks that
                gather inside the passes and must agree. The extra ones begin in the last columns and change nothing.

        Returns:
            Hidden states after the final norm [B, L, D], and cross-entropies [T] float32.
        """
        for deferred in chain.from_iterable(self.deferred):
            deferred.columns.clear()  # of a backward that did not come to its end
        if self.gathering is not None:
            self.gathering.release()  # likewise
        length = inputs_embeds.shape[1]
        packed: dict[str, Any] | None = None
        if batch.sample_ends is not None:
            if self.recurrent or len(inputs_embeds) != 1:
                raise RuntimeError("samples can share one row, and only where no hidden state is fed back")
            longest = max(batch.sample_tokens)
            packed = apart(batch.sample_ends, longest, length, inputs_embeds.dtype, self.attention)
        starts = self.starts(batch)
        spare = (column for column in range(length - 1, 0, -1) if column not in starts)
        starts |= {next(spare) for _ in range((num_passes or 0) - 1 - len(starts))}
        # Rows whose blocks lie in different columns have so many passes that storing them would take much memory.
        store_columns = len(batch.latent_columns) <= batch.most_latents

        # [B, L, head dimension], or with a first dimension of 3 where the layers combine the rows of position_ids.
        cos, sin = self.rotary_emb(inputs_embeds, batch.position_ids)
        past: list[list[KeyValue]] = [[] for _ in self.layers]
        hidden: list[torch.Tensor] = []
        uses = visits(self.gathering, len(self.groups), 1 + len(starts))
        for (start, end), pass_uses in zip(pairwise([0, *sorted(starts), length]), uses, strict=True):
            inputs = inputs_embeds[:, start:end]
            if hidden and self.recurrent:
                first = torch.where(batch.latent_mask[:, start, None, None], hidden[-1][:, -1:], inputs[:, :1])
                inputs = torch.cat([first, inputs[:, 1:]], dim=1)
            seen = packed or {"attention_mask": pass_mask(batch, start, end, self.attention)}
            rotary = (cos[..., start:end, :], sin[..., start:end, :])
            column = end == start + 1
            # With a mask, attention may store copies of all keys and values, such as repeated or unpadded ones.
            stored = column and store_columns and seen["attention_mask"] is None
            recompute = self.recompute and not stored
            later = start > 0 and (column or self.gathering is not None)
            hidden.append(self.one_pass(inputs, past, rotary, seen, pass_uses, recompute=recompute, deferred=later))
            self.check_cache(past, end)

        if self.gathering is not None and not torch.is_grad_enabled():
            self.gathering.release()  # else the last backward does it
        hidden_states = torch.cat(hidden, dim=1)
        return hidden_states, self.head(hidden_states.flatten(0, 1)[batch.target_rows], batch.target_ids)

    def one_pass(
        self,
        hidden: torch.Tensor,
        past: list[list[KeyValue]],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        seen: dict[str, Any],
        uses: Sequence[Visit],
        *,
        recompute: bool,
        deferred: bool,
    ) -> torch.Tensor:
        """Inputs [B, Q, D] -> final-normed hidden states [B, Q, D]; appends this pass's part to every layer's past.

        Args:
            seen: the layers' arguments that say what the columns may attend to.
            uses: of the groups, by this pass.
        """
        for visit, group in zip(uses, self.groups, strict=True):
            hidden, parts = visit.enter(hidden, past[group])
            new: list[KeyValue] = []
            for layer, earlier, gradients in zip(self.layers[group], parts, self.deferred[group], strict=True):
                arguments = (layer, hidden, tuple(earlier), position_embeddings, seen, gradients if deferred else [])
                if recompute:
                    # No layer draws random numbers, whose state would be read from the device in each layer and pass.
                    hidden, own = checkpoint(run_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden, own = run_layer(*arguments, remade=True)
                new.append(own)
            hidden, new = visit.leave(hidden, new)
            for parts_of_layer, own in zip(past[group], new, strict=True):
                parts_of_layer.append(own)
        return self.norm(hidden)

    def check_cache(self, past: list[list[KeyValue]], columns: int) -> None:
        """Raises if the cache lacks columns: a pass that does not see all earlier ones would be silently wrong."""
        for index, parts in enumerate(past):
            held = sum(key.shape[2] for key, _ in parts)
            if held != columns:
                raise RuntimeError(f"the KV cache of layer {index} holds {held} of {columns} columns")


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
