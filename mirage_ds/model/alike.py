"""When the latents of different rows are so alike that they can say little about their row. Needs no torch."""

# Mean angle between rows below 18 degrees. In the demo's models, where the content of the latents is worth 28 points,
# the mean cosine between rows was 0.76 to 0.85.
ALIKE = 0.95


def warn_if_alike(row_cosine: float | None) -> str | None:
    """One line if the mean cosine between the states of different rows is too large; else None."""
    if row_cosine is None or row_cosine <= ALIKE:
        return None
    return (
        f"the latents of different rows are alike: their mean cosine is {row_cosine:.3f} (above {ALIKE}), so they can "
        "say little about the question; compare the arms own, mean and shuffled of `mirage evaluate --latents`"
    )
