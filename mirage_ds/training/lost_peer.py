"""A collective fails because another rank has left: the reason is that rank's, and so is the message to read."""

import os
import signal
import sys
from typing import NoReturn

import torch

from mirage_ds.training import early_end

# What gloo, the TCP store and NCCL say then; and the DataLoader, whose workers some launchers end before their rank.
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "remote process exiting",
    "is killed by signal: Terminated",
)
PATIENCE_S = 5  # every launcher signals the other ranks well within this time


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether another rank's end is the cause: a collective of several ranks, whose connection is gone.

    A timeout is not: there the traceback says where this rank waited.
    """
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(words in str(error) for words in LOST_CONNECTION)


def leave(error: RuntimeError, patience_s: float = PATIENCE_S) -> NoReturn:
    """Ends this process with exit code 1, silently if the launcher asks for it: then it knows which rank failed first.

    Waiting for the launcher also lets it see the other rank's end before this one's.

    Args:
        patience_s: seconds after which this rank says in one line why it ends.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler raises when a worker ends
    if not early_end.is_asked_within(patience_s):
        reason = str(error).splitlines()[0]
        print(f"error: rank {os.environ['RANK']} cannot continue: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
