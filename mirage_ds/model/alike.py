"""When the latents of different rows are so alike that they can say little about their row. Needs no torch."""

# A mean angle between rows below 18 degrees. docs/results.md has the cosines of trained models beside what the content
# of their latents is worth.
ALIKE = 0.95


def warn_if_alike(row_cosine: float | None) -> str | None:
    """One line if the mean cosine between the states of different rows is too large; else None."""
    if row_cosine is None or not row_cosine > ALIKE:  # NaN is a fault of another kind
        return None
    return (
        f"the latents of different rows are alike: their mean cosine is {row_cosine:.3f} (above {ALIKE}), so they can "
        "say little about the question; compare the arms own, mean and shuffled of `mirage evaluate --latents`"
    )
