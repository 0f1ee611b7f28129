"""Work beside the training: where it fails, the run warns once and continues, as it has all that it needs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def housekeeping(what: str, remedy: str) -> Iterator[None]:
    """Turns an error of the system inside into a warning.

    Args:
        what: what was not done, with its place: "the old checkpoint was not deleted (PATH)".
        remedy: what the user may do about it.
    """
    try:
        yield
    except OSError as error:
        warn_once(f"{what}: {error.strerror or error}; the run continues; {remedy}")


@cache
def warn_once(text: str) -> None:
    """Prints a warning the first time that it is given."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
