"""Some of many rows."""


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spaced, as the samples of a folder may be sorted."""
    chosen = min(count, limit)
    return [place * count // chosen for place in range(chosen)]
