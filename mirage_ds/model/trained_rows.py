"""Embeddings and a head that are frozen but for the rows of a few tokens, which are parameters of their own.

The rows are not added to the frozen ones, but replace them: outputs and gradients are those of the full weight with
these rows in it. peft's `trainable_token_indices` compute the same, and copy the full weight for it.

Shape legend: R rows of their own, V vocabulary, D hidden, N hidden states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear


class TrainedRows(torch.nn.Module):
    """A frozen layer and its rows."""

    def __init__(self, base_layer: Any, rows: torch.nn.Parameter, ids: Sequence[int]) -> None:
        """
        Args:
            base_layer: a torch.nn.Embedding or Linear; its weight is [V, D].
            rows: [R, D]; embeddings and a tied head share them.
            ids: the tokens whose rows they are.
        """
        super().__init__()
        self.base_layer: Any = base_layer
        self.rows, self.ids = rows, tuple(ids)
        self.row_ids: torch.Tensor
        self.register_buffer("row_ids", torch.tensor(self.ids, device=base_layer.weight.device), persistent=False)

    @property
    def weight(self) -> torch.nn.Parameter:
        """The frozen weight [V, D]; the rows are not in it."""
        weight: torch.nn.Parameter = self.base_layer.weight
        return weight


class EmbeddingRows(TrainedRows):
    """Embeddings."""

    @property
    def embedding_dim(self) -> int:
        return int(self.base_layer.embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [...] -> embeddings [..., D]."""
        embeds = self.base_layer(input_ids)
        for row, token in zip(self.rows, self.ids, strict=True):
            embeds = torch.where((input_ids == token)[..., None], row, embeds)
        return embeds


class HeadRows(TrainedRows):
    """A language-model head."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return with_columns(self.base_layer(hidden), hidden, self.rows, self.row_ids)


def with_columns(logits: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Replaces the logits of these tokens, in place, by those of hidden states [N, D] and rows [R, D]: [N, V].

    Args:
        ids: [R] int64, of the tokens.
    """
    return logits.index_copy_(-1, ids, linear(hidden, rows))
