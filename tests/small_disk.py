"""Runs commands on a disk that is full: a small tmpfs, in its own mount namespace.

unshare --map-root-user --mount python small_disk.py DISK BYTES < [{"name", "arguments", "folder"}, ...]

Mounts DISK, starts each command in turn, as forked_starts.py does, and copies DISK to FOLDER/../NAME.disk after it, as
the disk disappears with its namespace. A start may also have "fill": fill the disk first, and "lie": report free space
that does not exist, as with a quota.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import forked_starts

import data_tools.cli
import mirage_ds.cli
import mirage_ds.train

MAINS = dict.fromkeys(("build", "make-vsp"), data_tools.cli.main)
MAINS |= dict.fromkeys(("init", "export", "evaluate"), mirage_ds.cli.main)
SPARE_BYTES = 16 * 1024  # left free, so that writing can start, unless a start has "spare_bytes"


class Usage(NamedTuple):
    free: int


def start(disk: Path, each: dict[str, Any]) -> int:
    if each.get("fill"):
        spare_bytes = each.get("spare_bytes", SPARE_BYTES)
        (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - spare_bytes)))

    def main() -> None:
        if each.get("lie"):
            shutil.disk_usage = lambda path: Usage(free=2**40)
        MAINS.get(each["arguments"][0], forked_starts.train)()

    code = forked_starts.fork(each, main)
    shutil.copytree(disk, Path(each["folder"]).parent / f"{each['name']}.disk")
    (disk / "filler").unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "tmpfs", str(disk)], check=True)
    print(json.dumps({each["name"]: start(disk, each) for each in json.load(sys.stdin)}))
