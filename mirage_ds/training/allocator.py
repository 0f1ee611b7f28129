"""How torch allocates GPU memory: a variable that torch reads when it is loaded. So this file imports no torch."""

import os

# The older name: torch 2.9.1 ignores the newer one (https://github.com/pytorch/pytorch/issues/183387), and all read it.
NAME, NEWER_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def grow_segments() -> None:
    """Lets torch's segments of GPU memory grow, unless the user has set something.

    In segments of fixed size, blocks of many GiB, as of a gathered rollout, leave gaps when they are freed, and the
    next such block finds no room in them.
    """
    if NEWER_NAME not in os.environ:
        os.environ.setdefault(NAME, "expandable_segments:True")
