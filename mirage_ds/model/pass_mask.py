"""What the columns of one pass of a rollout attend to, in the form that the attention implementation expects.

Shape legend: B rows, L columns, Q columns of one pass, which are [start, end).
"""

import torch

from mirage_ds.batch import Batch


def pass_mask(batch: Batch, start: int, end: int, attention: str) -> torch.Tensor | None:
    """The attention mask of a decoder layer; None where attention is right by itself.

    Nothing attends to padding that comes after all tokens of its row. So without other padding and hidden images no
    mask is needed where attention is causal by itself: FlashAttention aligns the last query with the last key; SDPA the
    first query with the first key, which is the same in the first pass, and for a single query.

    With a mask, FlashAttention gets the keys of each row alone, wherever its padding and its hidden images lie: its
    last queries are its last keys, as no column of this pass is hidden. A row may have no query. In a pass of one
    column every row has one, also where it is padding, whose output nothing uses; by then every row has tokens, so that
    it has keys.

    Args:
        attention: "sdpa" or "flash_attention_2".
    """
    keys = keys_of(batch, start)
    flash = attention == "flash_attention_2"
    columns = torch.arange(end, device=batch.input_ids.device)
    queries = columns[start:, None]
    if keys is None:
        exact = flash or start == 0 or end == start + 1
        return None if exact else (columns <= queries)[None, None]  # [1, 1, Q, end]
    if flash:
        return keys[:, :end]
    # Padding attends to itself: a softmax over no entries would be NaN.
    seen = ((columns <= queries) & keys[:, None, :end]) | (columns == queries)
    return seen[:, None]  # [B, 1, Q, end]


def keys_of(batch: Batch, start: int) -> torch.Tensor | None:
    """[B, L] bool: what a pass that begins in this column may attend to, as far as it comes before; None: everything.

    A pass begins in each of `Batch.hide_columns`, so that it has one answer for all its columns.
    """
    if batch.hidden_from is not None and batch.hide_columns and batch.hide_columns[0] <= start:
        is_hidden = batch.image_mask & (batch.hidden_from <= start)[:, None]
        return batch.attention_mask & ~is_hidden
    return batch.attention_mask if batch.left_padded else None
