"""An output folder that is either complete or does not exist."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirage_ds.errors import DataError, name_full_disk, name_unwritable


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `output` and renames it to `output` at the end, or deletes it on an error.

    Raises:
        DataError: `output` exists and is not an empty folder, or cannot be created.
        DiskFullError: there is no space for it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"the output already exists ({output}); expected a new or empty folder; name another or remove it"
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
