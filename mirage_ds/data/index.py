"""The files of a folder's index: opened, and compared with the manifest. Needs no torch.

Format 2 has it in four flat files, SHARDS/index/NAME.npy. They are mapped into memory, so that all processes of a node
share them through the page cache, and nothing is read but what is asked for:

samples       the numbers of each sample, see SAMPLE in columns.py
images        width, height of every image, as in the user's file: of each sample the input, then the helper images
latent_sizes  K of each latent block, of samples whose row has `latent_size`
keys          the bytes of all keys, one after the other

Format 1 has a line of JSON for each sample, SHARDS/index.jsonl, from which the same arrays are made in memory.
"""

import hashlib
import io
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mirage_ds.data.columns import COLUMNS, Index, IndexEntry, columns_of, consecutive
from mirage_ds.data.shards import IndexFile, ShardFolder, check_file_size, error_of
from mirage_ds.errors import DataError

INDEX_FOLDER = "index"
INDEX_NAME = "index.jsonl"  # of format 1
HEADER_BYTES = 512  # of a .npy file: always as many, so that it can be written after the values


def load_index(folder: ShardFolder) -> Index:
    """The entries of all samples, in the order of their keys. Of format 2 no more than four headers is read.

    Raises:
        DataError: a file is missing, or does not match the manifest: of format 2 in its size, type or length, of format
            1 in its digest.
    """
    if folder.manifest.format_version == 1:
        return _load_lines(folder)
    mapped = {name: _map_column(folder, name) for name in COLUMNS}
    columns = {name: column for name, (column, _) in mapped.items()}
    if len(columns["samples"]) != folder.num_samples:
        raise DataError(
            f"samples in the index: {len(columns['samples'])} ({folder.place.where(INDEX_FOLDER)}); the manifest says "
            f"{folder.num_samples}; both must come from one build; copy them again, or build again"
        )
    mappings = tuple(mapping for _, mapping in mapped.values())
    return Index(**columns, where=folder.place.where(INDEX_FOLDER), mappings=mappings)


def check_digests(folder: ShardFolder) -> None:
    """Reads the files of the index once and compares their digests with the manifest: a second per GB.

    Raises:
        DataError: one is missing or differs.
    """
    for file in folder.manifest.index:
        with _file(folder, file).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file.sha256:
            raise _other_build(folder, file)


def column_file(name: str) -> str:
    """A column's path in the folder of shards."""
    return f"{INDEX_FOLDER}/{name}.npy"


def column_header(name: str, length: int) -> bytes:
    """The header of a column's .npy file. By its own hand, so that equal columns are equal bytes with every numpy."""
    dtype, shape = COLUMNS[name]
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length, *shape)}
    text = f"{described!r}".ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("ascii")


def _map_column(folder: ShardFolder, name: str) -> tuple[npt.NDArray[Any], mmap.mmap]:
    """Trusts nothing that the file's header says: it must be the one that this length and this type have."""
    file = next((file for file in folder.manifest.index if file.name == column_file(name)), None)
    if file is None:
        raise DataError(
            f"the manifest names no {column_file(name)} ({folder.place}); an index of format 2 has it; copy the folder "
            "of shards again, or build again"
        )
    check_file_size(folder.place, file, "index file")
    path, (dtype, shape) = _file(folder, file), COLUMNS[name]
    length, rest = divmod(path.stat().st_size - HEADER_BYTES, dtype.itemsize * int(np.prod(shape, dtype=int)))
    with path.open("rb") as opened:
        header = opened.read(HEADER_BYTES)
        mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if length < 0 or rest or header != column_header(name, length):
        raise DataError(
            f"the header of the index file is not that of {name} ({folder.place.where(file.name)}); expected what "
            "`mirage-data build` wrote; copy the folder of shards again, or build again"
        )
    return np.frombuffer(mapping, dtype, offset=HEADER_BYTES).reshape(-1, *shape), mapping


def _load_lines(folder: ShardFolder) -> Index:
    file = folder.manifest.index[0]
    data = _file(folder, file).read_bytes()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise _other_build(folder, file)
    # The digest matches, so the contents need no further checks.
    parts = list(consecutive(columns_of(IndexEntry(**json.loads(line)) for line in io.BytesIO(data))))
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return Index(**columns, where=folder.place.where(file.name))


def _file(folder: ShardFolder, file: IndexFile) -> Path:
    """A file of the index, on a disk of this machine. Raises: DataError: it cannot be opened."""
    try:
        path = folder.place.file(file.name, file.sha256)
        path.open("rb").close()
        return path
    except OSError as error:
        raise error_of(error)(
            f"{file.name} cannot be read: {error.strerror} ({folder.place.where(file.name)}); a folder of shards has "
            "one; copy it again, or build again"
        ) from error


def _other_build(folder: ShardFolder, file: IndexFile) -> DataError:
    return DataError(
        f"{file.name} does not match the manifest ({folder.place.where(file.name)}); both must come from one build; "
        "copy it again, or build again"
    )
