"""Latent health in training: what the states at the latents have in common, slot by slot, from the micro-batches.

A slot is a latent's place in the first block of its sample; later blocks are left out. The states are those before the
latents: in stage 1 the predictions of the targets, in stage 2 what is fed back. Of the n states s_i that a logged step
makes at one slot, on all ranks, each in another sample:

    norm            mean of ||s_i|| / mean of ||e|| over the embeddings e of the answers' tokens
    row cosine      mean of cos(s_i, s_j) over all pairs i != j = (||u_1 + .. + u_n||^2 - n) / (n (n - 1)),
                    u_i = s_i / ||s_i||; 1: the slot says the same whatever the question
    next cosine     mean of cos(s_i, the state of the same block at the next slot)
    target cosine   mean of cos(s_i, its latent target), in stage 1

All are sums over the states, which stay on the device: a micro-batch adds to them, and waits for nothing.

Shape legend: S slots, M latents of a micro-batch, D hidden.
"""

from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import normalize, pad

from mirage_ds.batch import Batch
from mirage_ds.model.alike import warn_if_alike
from mirage_ds.model.targets import LatentTargets
from mirage_ds.zero3 import distributed

Figures = list[float | None]


@dataclass(frozen=True)
class LatentFigures:
    """Each by slot; None where there is nothing to average."""

    num_rows: list[int]  # n
    norm: Figures
    row_cosine: Figures
    next_cosine: Figures
    target_cosine: Figures

    def curves(self) -> dict[str, float]:
        """By name and slot, without the numbers of rows."""
        return {
            f"{name}_{slot}": value
            for name, values in asdict(self).items()
            if name != "num_rows"
            for slot, value in enumerate(values)
            if value is not None
        }

    def warning(self) -> str | None:
        """One line if the states of different rows are alike, in the mean over slots weighted by rows; else None."""
        known = [(cosine, n) for cosine, n in zip(self.row_cosine, self.num_rows, strict=True) if cosine is not None]
        if not known:
            return None
        return warn_if_alike(sum(cosine * n for cosine, n in known) / sum(n for _, n in known))


class LatentSums:
    """Sums over the latents of one step, on this rank."""

    NUMBERS = 5  # beside the sum of directions: states, norms, target cosines, pairs of neighbours, their cosines

    def __init__(self, num_slots: int, hidden_size: int, device: torch.device) -> None:
        """
        Args:
            num_slots: S; latents at later places of longer blocks are left out.
        """
        self.hidden_size, self.num_slots = hidden_size, num_slots
        # The last row takes what is left out, so that nothing waits for its number.
        self.sums = torch.zeros(num_slots + 1, hidden_size + self.NUMBERS, device=device)
        self.embeddings = torch.zeros(2, device=device)  # their number, and the sum of their norms
        self.active = False  # whether the step under way is to be reported

    def add(self, hidden: torch.Tensor, targets: LatentTargets, text_embeds: torch.Tensor, batch: Batch) -> None:
        """Adds a micro-batch: hidden states and embeddings [B, L, D], which need no gradient."""
        if not self.active or not len(batch.latent_rows):
            return
        states = hidden.flatten(0, 1)[batch.latent_rows - 1].float()
        norms = torch.linalg.vector_norm(states, dim=1)
        directions = normalize(states, dim=1)
        # Between two blocks there are at least their markers.
        begins = pad(batch.latent_rows.diff() != 1, (1, 0), value=True)
        place = _places(begins)
        first_block = place == _places(pad(_samples(batch).diff() != 0, (1, 0), value=True))
        slot = torch.where(first_block, place, self.num_slots).clamp(max=self.num_slots)
        has_next = pad(~begins[1:], (0, 1), value=False).float()
        next_cosines = has_next * pad((directions[:-1] * directions[1:]).sum(dim=1), (0, 1))
        target_cosines = torch.zeros_like(norms)
        if len(targets.targets):
            target_cosines = (directions * targets.targets.detach()).sum(dim=1) * targets.inverse_norms.detach()
        columns = torch.stack([torch.ones_like(norms), norms, target_cosines, has_next, next_cosines], dim=1)
        self.sums.index_add_(0, slot, torch.cat([directions, columns], dim=1))
        embeds = text_embeds.flatten(0, 1)[batch.target_rows].float()
        self.embeddings[0] += len(embeds)
        self.embeddings[1] += torch.linalg.vector_norm(embeds, dim=1).sum()

    def take(self, *, targets: bool) -> LatentFigures:
        """What all ranks have added since the last call, in one all-reduce.

        Args:
            targets: whether the latents have targets.
        """
        own = torch.cat([self.sums[:-1].flatten(), self.embeddings])
        total = distributed.sum_over_ranks(own).double().cpu()
        self.sums.zero_()
        self.embeddings.zero_()
        by_slot, (num_embeds, embed_norms) = total[:-2].view(self.num_slots, -1), total[-2:].tolist()
        squares = by_slot[:, : self.hidden_size].square().sum(dim=1)
        count, norms, target_cosines, num_next, next_cosines = by_slot[:, self.hidden_size :].T
        return LatentFigures(
            num_rows=[int(n) for n in count.tolist()],
            norm=_quotients(norms * num_embeds, count * embed_norms),
            row_cosine=_quotients(squares - count, count * (count - 1)),
            next_cosine=_quotients(next_cosines, num_next),
            target_cosine=_quotients(target_cosines, count * targets),
        )


def _quotients(sums: torch.Tensor, counts: torch.Tensor) -> Figures:
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]


def _places(begins: torch.Tensor) -> torch.Tensor:
    """How far each of [M] is from the last True of `begins` before it or at it."""
    numbers = torch.arange(len(begins), device=begins.device)
    return numbers - torch.where(begins, numbers, 0).cummax(dim=0).values


def _samples(batch: Batch) -> torch.Tensor:
    """[M] the number of each latent's sample in its micro-batch."""
    if batch.sample_ends is None:
        return batch.latent_rows // batch.input_ids.shape[1]
    return torch.searchsorted(batch.sample_ends, batch.latent_rows.to(batch.sample_ends.dtype), right=True)
