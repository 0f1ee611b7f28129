"""A sample's token ids: pads repeated to the number of their embeddings, the answers, labels.

Shape legend: L tokens, K latents per block.
"""

from collections.abc import Sequence

import torch

from mirage_ds.tokens import IGNORE_INDEX, TokenIds


def expand_pads(
    input_ids: torch.Tensor, num_merged: Sequence[int], latent_sizes: Sequence[int], ids: TokenIds
) -> torch.Tensor:
    """Repeats the one pad of each block: once per merged token for an image, as K latent pads for a latent block.

    Works on ids instead of text: special tokens split the text, so the result is the same, without tokenizing the pads.

    Args:
        input_ids: [short L], with one <|image_pad|> per block.
        num_merged: merged tokens of each input image, in order.
        latent_sizes: K of each latent block, in order.
    Returns:
        [L] int64
    """
    pads = input_ids == ids.image_pad
    latents = pads & (input_ids.roll(1) == ids.latent_start)
    assert int((pads & ~latents).sum()) == len(num_merged), "one pad for each image"
    assert int(latents.sum()) == len(latent_sizes), "one pad for each latent block"
    repeats = torch.ones_like(input_ids)
    repeats[pads & ~latents] = torch.tensor(num_merged, dtype=torch.int64)
    repeats[latents] = torch.tensor(latent_sizes, dtype=torch.int64)
    return torch.where(latents, ids.latent_pad, input_ids).repeat_interleave(repeats)


def find_answers(input_ids: torch.Tensor, marker: torch.Tensor) -> list[range]:
    """Of each answer in ids [L] its tokens: from `marker`, the ids of <|im_start|>assistant, to the next <|im_start|>.

    So it has the newline before and after its text, and its <|im_end|>.
    """
    found = (input_ids.unfold(0, len(marker), 1) == marker).all(dim=1).nonzero().flatten().tolist()
    turns = [*(input_ids == marker[0]).nonzero().flatten().tolist(), len(input_ids)]
    return [range(start + len(marker), next(turn for turn in turns if turn > start)) for start in found]


def supervised_labels(input_ids: torch.Tensor, trained: Sequence[range], ids: TokenIds) -> torch.Tensor:
    """Labels [L] of ids [L], not shifted: the tokens of these answers.

    IGNORE_INDEX at all others, at <|endoftext|>, and at latent pads, which have the latent loss.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for answer in trained:
        labels[answer.start : answer.stop] = input_ids[answer.start : answer.stop]
    labels[(input_ids == ids.end_of_text) | (input_ids == ids.latent_pad)] = IGNORE_INDEX
    return labels
