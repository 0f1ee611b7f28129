"""Decoding that is watched, or told what to emit, against the losses of training on what it emitted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.inference.sampling import Sampling
from mirage_ds.model.mirage import MirageModel
from mirage_ds.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Watched(Sampling):
    """Greedy, and keeps the log-probabilities [B, V] of every step; or takes the tokens of a script for its one row."""

    script: Iterator[int] | None = None
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def choose(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        self.log_probs.append(logits.log_softmax(dim=-1))
        if self.script is None:
            return super().choose(logits, generators)
        return torch.tensor([next(self.script)])

    def of(self, row: int, labels: Sequence[int]) -> float:
        """The sum over a row's steps of the log-probabilities of its emitted tokens, those without a label left out."""
        steps = zip(self.log_probs, labels, strict=False)
        return sum(each[row, label].item() for each, label in steps if label != IGNORE_INDEX)


def cross_entropy(model: MirageModel, sample: EncodedSample) -> float:
    """The sum over a row's supervised tokens, as training computes it."""
    with torch.no_grad():
        losses = model(collate([sample], align_latents=True))
    return losses.ce_loss.item() * int((sample.labels[1:] != IGNORE_INDEX).sum())
