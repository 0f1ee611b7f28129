"""The processes that share an evaluation: each has the whole model, on a GPU of its own if there are GPUs.

They are a process group of gloo, which carries words and scores. torch is imported only where there are several.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mirage_ds.errors import MirageError
from mirage_ds.launcher import map_slurm_variables, no_device, take_device

Value = TypeVar("Value")

WAIT = timedelta(days=7)
"""The longest wait for the slowest rank. One that ends is noticed at once: its connection is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """The values of all ranks, in their order, on every rank."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, and that writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)

    def of_first(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        return self.gather(value if self.is_first else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what every rank does: a user's mistake that one of them meets ends all, and one of them says it."""
        error = None
        try:
            yield
        except MirageError as found:
            error = found
        errors = self.gather(error)
        failed = [rank for rank, each in enumerate(errors) if each is not None]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            sys.exit(errors[failed[0]].exit_code)


def join() -> Ranks:
    """Joins the other ranks that the launcher (mirage-launch, torchrun, srun) has started; alone without one.

    Raises:
        DeviceError: there are GPUs, but this rank has none of its own.
    """
    map_slurm_variables()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    import torch  # imported here, as it takes seconds: one process first does all checks that do not need it

    torch.distributed.init_process_group("gloo", timeout=WAIT)
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), _gather)
    _take_gpu(ranks)
    return ranks


def _gather(value: Any) -> list[Any]:
    import torch

    values: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"rank {os.environ['RANK']} ends, as another rank has ended; see the message of that one ({reason})")
    return values


def _take_gpu(ranks: Ranks) -> None:
    """Makes the GPU of this rank the current one."""
    import torch

    from mirage_ds.inference.generate import choose_device

    gpu = None
    with ranks.together():
        if choose_device() == "cuda":
            device = take_device(torch.cuda.device_count())
            torch.cuda.set_device(device)
            gpu = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    gpus = ranks.gather(gpu)
    with ranks.together():
        if gpu is not None and gpus.count(gpu) > 1:
            raise no_device("it shares its GPU with another rank")
