"""What an arm changes: the decoder that decodes it, and what is asked."""

from collections.abc import Sequence
from dataclasses import replace

from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.arms import Arm
from mirage_ds.evaluation.feeds import MeanStates, ShuffledStates, next_rows
from mirage_ds.evaluation.states import States
from mirage_ds.inference.feed import zeroed
from mirage_ds.inference.generate import Decoder


class Replacements:
    """The replacements of one evaluation. The same on every rank: all draws depend on the seed and the rows alone."""

    def __init__(self, decoder: Decoder, encoder: Encoder, rows: Sequence[Row], seed: int) -> None:
        self.decoder, self.encoder, self.rows, self.seed = decoder, encoder, rows, seed

    def prompt(self, arm: Arm, row: Row) -> EncodedSample:
        """What is asked of a row."""
        return self.encoder.prompt(row.sample)

    def decoder_of(self, arm: Arm, states: States) -> Decoder:
        """The decoder of an arm; in the arm `own` its `feed` is None.

        Args:
            states: those of all rows, if the arm needs them.
        """
        if arm.latents == "none":
            return replace(self.decoder, forbidden=(self.decoder.ids.latent_start,))
        if arm.latents == "markers":
            return replace(self.decoder, latent_size=0)
        if arm.latents == "zeroed":
            return replace(self.decoder, feed=zeroed)
        if arm.latents == "mean":
            return replace(self.decoder, feed=MeanStates(states))
        if arm.latents == "shuffled":
            return replace(self.decoder, feed=ShuffledStates(states, next_rows(self.rows, self.seed)))
        return self.decoder
