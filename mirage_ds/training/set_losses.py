"""The losses of each data set of a mixture: sums over its samples in one step, on this rank.

As the losses of a step, they are sums of each sample's own means, so that they add up over micro-batches and ranks
however a global batch is cut. They stay on the device: a micro-batch adds to them, and waits for nothing.
"""

from collections.abc import Sequence

import torch

from mirage_ds.batch import Batch


class SetLosses:
    """Sums over the samples of the step under way."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """
        Args:
            names: of the sets, by their numbers.
        """
        self.names = tuple(names)
        self.sums = torch.zeros(len(names), 3, device=device)  # text losses, latent losses, number of samples
        self.active = False  # whether a step is under way: a validation is none

    def begin(self) -> None:
        """A step begins."""
        self.sums, self.active = torch.zeros_like(self.sums), True

    def add(self, text_losses: torch.Tensor, latent_losses: torch.Tensor, batch: Batch) -> None:
        """Adds a micro-batch.

        Args:
            text_losses: [T], of supervised tokens, with their weights; without gradients.
            latent_losses: [M], of latents, likewise.
        """
        if not self.active:
            return
        for column, rows, losses in ((0, batch.target_rows, text_losses), (1, batch.latent_rows, latent_losses)):
            self.sums[:, column].index_add_(0, batch.sample_sets[batch.samples_at(rows)], losses.float())
        self.sums[:, 2].index_add_(0, batch.sample_sets, torch.ones_like(batch.sample_sets, dtype=torch.float32))

    def take(self) -> torch.Tensor:
        """[sets, 3]: what the step's micro-batches have added."""
        self.active = False
        return self.sums
