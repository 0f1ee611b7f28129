"""What is fed at the latents instead of the model's own states: how a decoder asks for it."""

from typing import NamedTuple, Protocol

import torch


class Slot(NamedTuple):
    """A latent's place in an answer, counted from 0."""

    block: int
    place: int  # within the block


class Feed(Protocol):
    """Chooses what is fed at one latent of one row."""

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
        """Called for every latent of every row that has not ended, in order.

        Args:
            key: the row's.
            own: [D]: the state that the model made, on the model's device.

        Returns:
            [D], on any device, to be fed instead; None: the own state is fed.
        """


def zeroed(key: str, slot: Slot, own: torch.Tensor) -> torch.Tensor:
    """Feeds zeros."""
    return torch.zeros_like(own)
