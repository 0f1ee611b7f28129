"""Latent health in training: what the states at the latents have in common, slot by slot, from the micro-batches.

A slot is a latent's place in the first block of its sample; later blocks are left out. The states are those before the
latents: in stage 1 the predictions of the targets, in stage 2 what is fed back. Of the n states s_i that a logged step
makes at one slot, on all ranks, each in another sample:

    norm            mean of ||s_i|| / mean of ||e|| over the embeddings e of the answers' tokens
    row cosine      mean of cos(s_i, s_j) over all pairs i != j = (||u_1 + .. + u_n||^2 - n) / (n (n - 1)),
                    u_i = s_i / ||s_i||; 1: the slot says the same whatever the question
    next cosine     mean of cos(s_i, the state of the same block at the next slot)
    target cosine   mean of cos(s_i, its latent target), in stage 1
    effective rank  the number of directions in which the s_i lie, from 1 (alike) to n: see model/effective_rank.py. Of
                    at most MAX_SAMPLED states: the first ones that each of the first MAX_SAMPLED ranks makes

The others are sums over the states. Sums and sampled states stay on the device: a micro-batch adds to them, and waits
for nothing.

Shape legend: S slots, M latents of a micro-batch, N sampled states of a slot on this rank, D hidden.
"""

from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import normalize, pad

from mirage_ds.batch import Batch
from mirage_ds.model.alike import warn_if_alike
from mirage_ds.model.effective_rank import effective_rank
from mirage_ds.model.targets import LatentTargets
from mirage_ds.zero3 import distributed

Figures = list[float | None]
MAX_SAMPLED = 64  # states of a slot, over all ranks; those of a 7B with K = 4 take 3.7 MB in the all-reduce


@dataclass(frozen=True)
class LatentFigures:
    """Each by slot; None where there is nothing to average."""

    num_rows: list[int]  # n
    norm: Figures
    row_cosine: Figures
    next_cosine: Figures
    target_cosine: Figures
    effective_rank: Figures

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
        # The sample of all ranks is [MAX_SAMPLED, S, D], of which every world_size-th row is this rank's.
        self.own_sampled = slice(distributed.rank(), None, distributed.world_size())
        self.num_sampled = len(range(MAX_SAMPLED)[self.own_sampled])  # N
        self.sampled = torch.zeros(self.num_sampled + 1, num_slots + 1, hidden_size, device=device)
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
        first_block = place == _places(pad(batch.samples_at(batch.latent_rows).diff() != 0, (1, 0), value=True))
        slot = torch.where(first_block, place, self.num_slots).clamp(max=self.num_slots)
        has_next = pad(~begins[1:], (0, 1), value=False).float()
        next_cosines = has_next * pad((directions[:-1] * directions[1:]).sum(dim=1), (0, 1))
        target_cosines = torch.zeros_like(norms)
        if len(targets.targets):
            target_cosines = (directions * targets.targets.detach()).sum(dim=1) * targets.inverse_norms.detach()
        self.sample(states, slot)
        columns = torch.stack([torch.ones_like(norms), norms, target_cosines, has_next, next_cosines], dim=1)
        self.sums.index_add_(0, slot, torch.cat([directions, columns], dim=1))
        embeds = text_embeds.flatten(0, 1)[batch.target_rows].float()
        self.embeddings[0] += len(embeds)
        self.embeddings[1] += torch.linalg.vector_norm(embeds, dim=1).sum()

    def sample(self, states: torch.Tensor, slot: torch.Tensor) -> None:
        """Keeps those of states [M, D] whose slots [M] have fewer than N states yet; before they are counted."""
        is_at = slot[:, None] == torch.arange(self.num_slots + 1, device=slot.device)
        earlier = is_at.cumsum(dim=0).gather(1, slot[:, None])[:, 0] - 1 + self.sums[slot, self.hidden_size].long()
        row = earlier.clamp(max=self.num_sampled)
        self.sampled.flatten(0, 1).index_copy_(0, row * (self.num_slots + 1) + slot, states)

    def take(self, *, targets: bool) -> LatentFigures:
        """What all ranks have added since the last call, in one all-reduce.

        Args:
            targets: whether the latents have targets.
        """
        sampled = self.sums.new_zeros(MAX_SAMPLED, self.num_slots, self.hidden_size)
        sampled[self.own_sampled] = self.sampled[:-1, :-1]
        own = torch.cat([self.sums[:-1].flatten(), self.embeddings, sampled.flatten()])
        total = distributed.sum_over_ranks(own)
        for each in (self.sums, self.embeddings, self.sampled):
            each.zero_()
        ranks = self.effective_ranks(total[-sampled.numel() :].view_as(sampled))
        total = total[: -sampled.numel()].double().cpu()
        by_slot, (num_embeds, embed_norms) = total[:-2].view(self.num_slots, -1), total[-2:].tolist()
        squares = by_slot[:, : self.hidden_size].square().sum(dim=1)
        count, norms, target_cosines, num_next, next_cosines = by_slot[:, self.hidden_size :].T
        return LatentFigures(
            num_rows=[int(n) for n in count.tolist()],
            norm=_quotients(norms * num_embeds, count * embed_norms),
            row_cosine=_quotients(squares - count, count * (count - 1)),
            next_cosine=_quotients(next_cosines, num_next),
            target_cosine=_quotients(target_cosines, count * targets),
            effective_rank=ranks,
        )

    def effective_ranks(self, sampled: torch.Tensor) -> Figures:
        """By slot, of sampled states [MAX_SAMPLED, S, D]; zeros where there are fewer. The rest is done on the host.

        A slot may have states and none that is sampled: of more ranks than MAX_SAMPLED, the last ones give none.
        """
        grams = torch.stack([states @ states.T for slot in sampled.unbind(1) for states in [slot.double()]]).cpu()
        is_state = grams.diagonal(dim1=1, dim2=2) != 0
        filled = is_state.any(dim=0)  # a small batch has small matrices
        filled[0] = True  # and a step without latents none
        ranks = effective_rank(grams[:, filled][:, :, filled]).tolist()
        return [rank if known else None for rank, known in zip(ranks, is_state.any(dim=1).tolist(), strict=True)]


def _quotients(sums: torch.Tensor, counts: torch.Tensor) -> Figures:
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]


def _places(begins: torch.Tensor) -> torch.Tensor:
    """How far each of [M] is from the last True of `begins` before it or at it."""
    numbers = torch.arange(len(begins), device=begins.device)
    return numbers - torch.where(begins, numbers, 0).cummax(dim=0).values
