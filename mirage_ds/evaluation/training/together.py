"""What all ranks do together, each in its own time, and how it ends on all of them if it fails on one."""

from collections.abc import Callable
from typing import Any, TypeVar

from mirage_ds.errors import MirageError
from mirage_ds.training import early_end
from mirage_ds.zero3 import distributed

Gather = Callable[[Any], list[Any]]
"""The values of all ranks, on every rank."""
Result = TypeVar("Result")


def leave_if_asked(done: int, total: int) -> None:
    """Between two batches or scores: a run that is asked to end does not finish its evaluation.

    Raises:
        AskedToEndError: this rank has a signal.
    """
    if early_end.is_asked():
        raise AskedToEndError


class AskedToEndError(Exception):
    """The run is asked to end while it evaluates."""


class FailedError(Exception):
    """A rank has failed, perhaps this one."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault


def together(work: Callable[[Gather], Result]) -> Result:
    """Does `work` on all ranks. They exchange values equally often; one that has failed says so at its next exchange,
    which ends the work of all there: none waits for ever.

    Raises:
        FailedError: on every rank, with the first failure that has a name.
    """

    def gather(value: Any, fault: Exception | None = None) -> list[Any]:
        found = distributed.gather((value, fault))
        for _, each in found:
            if each is not None:
                raise FailedError(each)
        return [value for value, _ in found]

    try:
        result = work(gather)
    except (MirageError, OSError, AskedToEndError) as error:
        gather(None, error)
        raise
    gather(None)
    return result
