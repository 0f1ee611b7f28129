"""The replacements of latents that need no other row, each as a change of the decoder."""

from dataclasses import replace

from mirage_ds.inference.feed import zeroed
from mirage_ds.inference.generate import Decoder


def without_block(decoder: Decoder) -> Decoder:
    """Never opens a latent block."""
    return replace(decoder, forbidden=(*decoder.forbidden, decoder.ids.latent_start))


def with_empty_blocks(decoder: Decoder) -> Decoder:
    """Ends every block where it starts: <|latent_start|> is directly followed by <|latent_end|>."""
    return replace(decoder, latent_size=0)


def with_zeros(decoder: Decoder) -> Decoder:
    """Is fed zeros at every latent."""
    return replace(decoder, feed=zeroed)


REPLACED = {"none": without_block, "markers": with_empty_blocks, "zeroed": with_zeros}
