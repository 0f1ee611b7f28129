"""Converts a folder of shards of format 1, whose index is a line of JSON per sample, to format 2. The shards stay.

The folder keeps its digest: it is the same data set, so runs resume on it, in the same order, and counted tokens and
kept targets stay valid.
"""

from pathlib import Path

from data_tools.manifest import write_manifest
from mirage_ds.data.index import INDEX_NAME, load_index
from mirage_ds.data.shards import FORMAT_VERSION, Manifest, ShardFolder, load_manifest
from mirage_ds.errors import DataError, name_full_disk, name_unwritable
from mirage_ds.owner import of_output


def upgrade(path: Path) -> Manifest:
    """Writes the index of format 2 beside the shards, then the manifest, and removes the index of format 1.

    Killed at any moment, it leaves a folder that can be read, and can be started again.

    Raises:
        DataError: the folder is damaged, is of format 2 already, or cannot be written.
        OwnerError: another upgrade of it is under way.
        DiskFullError: its disk is full.
    """
    load_manifest(path)
    remedy = "the folder is still of format 1; free some space, and upgrade again"
    owner = of_output(path.resolve())
    with name_full_disk(path, remedy), name_unwritable(path, "upgrade a copy of the folder that you may write"):
        owner.claim()
        try:
            return _upgrade(load_manifest(path))
        finally:
            owner.release()


def _upgrade(folder: ShardFolder) -> Manifest:
    if folder.manifest.format_version == FORMAT_VERSION:
        if folder.manifest.upgraded_from is not None and (folder.path / INDEX_NAME).exists():
            (folder.path / INDEX_NAME).unlink()  # what was left to do when an earlier upgrade was ended
            return folder.manifest
        raise DataError(
            f"the folder has format {FORMAT_VERSION} already ({folder.path}); only format 1 can be upgraded; use it as "
            "it is"
        )
    index = load_index(folder)
    manifest = write_manifest(folder.path, folder.manifest.shards, index, upgraded_from=folder.digest)
    (folder.path / INDEX_NAME).unlink()
    return manifest
