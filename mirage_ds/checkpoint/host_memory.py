"""How much memory a host has left for copies of checkpoints: what the machine has, and what the job may take of it.

A job's limit is that of its control groups (Linux cgroups, version 2 or 1), which SLURM and containers set.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

from mirage_ds.zero3 import distributed

USABLE = 0.9  # of what is free; the rest is for everything else that grows
# Folder and files of a hierarchy: limit, use, and the entries of memory.stat that the kernel frees when it needs to.
VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))
VERSION_1 = (
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def shortage(own_bytes: int) -> str | None:
    """Why the ranks of a host cannot take so many bytes each, or None if all can; a collective call of all ranks."""
    found = distributed.gather((socket.gethostname(), own_bytes, available_bytes()))
    for host in dict.fromkeys(host for host, _, _ in found):
        needed = sum(size for name, size, _ in found if name == host)
        free = int(USABLE * min(free for name, _, free in found if name == host))
        if needed > free:
            return f"the ranks on {host} need {needed / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free"
    return None


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still take, as the machine and each control group around it see it."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, use, freeable = VERSION_1 if controllers else VERSION_2
        top = root / folder
        group = top / path.removeprefix("/")
        for each in (group, *group.parents):
            # In a container the path may be that of its host: then the mounted folder itself is the container's group.
            if each.is_relative_to(top) and (each / limit).exists() and (each / limit).read_text().strip() != "max":
                stat = dict(entry.split() for entry in (each / "memory.stat").read_text().splitlines())
                used = int((each / use).read_text()) - sum(int(stat[name]) for name in freeable)
                yield int((each / limit).read_text()) - used
