"""A folder of output that is there complete, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirage_ds.errors import DataError, name_full_disk, name_unwritable


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that takes its place at the end: all of it is there, or nothing.

    Raises:
        DataError: `output` is there and not an empty folder.
        DiskFullError: there is no room for it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"the output is there already ({output}); allowed is a new or an empty folder; name another or remove it"
        )
    temporary = output.absolute().parent / f".{output.name}.{os.getpid()}.tmp"
    with name_unwritable(output, "name another"):
        temporary.mkdir(parents=True)
    remedy = f"nothing of {output.name} was kept; free some space, or write it to another disk"
    try:
        with name_full_disk(temporary.parent, remedy):
            yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise
