"""Which places of the order have their images hidden after the first latent block: `data.text_dropout_image`.

A pure function of seed and position: the same for any number of ranks and data workers, and after a resume. Each epoch
has other positions, and so other draws for a sample. Needs no torch.
"""

import hashlib


def drops_image(seed: int, share: float, position: int) -> bool:
    """Whether the sample at a position of the order is one of the `share` whose images are hidden.

    Uses its own hash, so that no change in a library's random generator can change it.
    """
    digest = hashlib.sha256(f"text_dropout_image/{seed}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64
