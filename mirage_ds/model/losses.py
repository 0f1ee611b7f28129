"""Text loss and latent loss: per token and per latent, in float32.

A Batch has the weights of the averages: 1 / (supervised tokens of the sample) for each supervised token,
1 / (latents of the sample) for each latent. The weighted sum is then the sum over samples of each sample's own mean,
whatever the padding.
"""

import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from mirage_ds.model.trained_rows import HeadRows, with_columns
from mirage_ds.ops.latent_pool_definition import EPS

# Logits of one block of rows: 2 ** 25 elements are 64 MiB in bf16, whatever the vocabulary.
LOGIT_BLOCK_ELEMENTS = 2**25


class LossHead(torch.nn.Module):
    """The language-model head and the cross-entropy of its logits, one block of rows at a time.

    Only one block of logits exists at a time: backward begins with the last block, whose logits are kept, and
    recomputes those of the others. Under ZeRO-3 the head is one leaf module: ranks may have different numbers of
    blocks.
    """

    def __init__(
        self, weight: torch.nn.Parameter, vocab_size: int, *, shared: bool, trained_rows: HeadRows | None = None
    ) -> None:
        """
        Args:
            weight: [V, D] of the language-model head; under ZeRO-3 its shard.
            vocab_size: V.
            trained_rows: the head, if some of its rows are parameters of their own; they are shared as the weight is.
            shared: the weight is also the embedding's (tied), which owns it. ZeRO-3 reduces the gradients of the
                parameters that a leaf module owns when backward leaves it, before the embedding's part is added.
        """
        super().__init__()
        self.shared = shared
        self.own_weight = None if shared else weight
        # In a tuple, so that this module does not register the parameter.
        self.weights: tuple[torch.nn.Parameter, ...] = (weight,)
        self.own_rows: torch.nn.Parameter | None = None
        self.row_ids: torch.Tensor
        if trained_rows is not None:
            self.own_rows = None if shared else trained_rows.rows
            self.weights += (trained_rows.rows,)
            self.register_buffer("row_ids", torch.tensor(trained_rows.ids, device=weight.device), persistent=False)
        self.block_rows = max(1, LOGIT_BLOCK_ELEMENTS // vocab_size)

    def forward(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row: hidden [T, D], target_ids [T] int64 -> [T] float32."""
        *blocks, last = zip(hidden.split(self.block_rows), target_ids.split(self.block_rows), strict=True)
        losses = [
            checkpoint(self._block_loss, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks
        ]
        return torch.cat([*losses, self._block_loss(*last)])

    def _block_loss(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        weight, *rows = self.weights
        logits = torch.nn.functional.linear(hidden, weight)
        if rows:
            logits = with_columns(logits, hidden, rows[0], self.row_ids)
        return chunked_cross_entropy(logits, target_ids, reduction="none")


def latent_losses(latent_pred: torch.Tensor, latent_target: torch.Tensor, inverse_norms: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each latent, in float32: [M, D], targets [M, D] and the inverses of their norms [M] -> [M]."""
    unit_pred = normalize(latent_pred.float(), dim=-1, eps=EPS)
    return 1 - (unit_pred * latent_target).sum(dim=-1) * inverse_norms
