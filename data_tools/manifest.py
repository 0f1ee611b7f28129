"""Writes manifest.json and the index of finished shards; mirage_ds/data/shards.py and index.py read them."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mirage_ds.data.columns import COLUMNS, Index, IndexEntry, columns_of, consecutive
from mirage_ds.data.index import INDEX_FOLDER, column_file, column_header
from mirage_ds.data.shards import FORMAT_VERSION, MANIFEST_NAME, IndexFile, Manifest, Shard


def write_manifest(
    folder: Path, shards: Sequence[Shard], entries: Iterable[IndexEntry], *, upgraded_from: str | None = None
) -> Manifest:
    """Writes the index and manifest.json to a folder of finished shards; equal contents give equal bytes.

    The manifest comes last, and at once: a folder has the one from before, or all that this one names.

    Args:
        entries: of all samples, in their order; they are written as they come, so that any number needs little memory.
        upgraded_from: see Manifest.
    """
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        num_samples=sum(shard.samples for shard in shards),
        index=write_index(folder, columns_of(entries)),
        shards=tuple(shards),
        upgraded_from=upgraded_from,
    )
    fields = {name: value for name, value in asdict(manifest).items() if value is not None}
    part = folder / f".{MANIFEST_NAME}.tmp"
    with part.open("w", encoding="ascii") as file:
        file.write(json.dumps(fields, indent=1) + "\n")
        _sync(file)
    part.replace(folder / MANIFEST_NAME)
    return manifest


def write_index(folder: Path, parts: Iterable[Index]) -> tuple[IndexFile, ...]:
    """Writes these columns one behind the other, in place of any that are there; each part is of its samples alone."""
    (folder / INDEX_FOLDER).mkdir(exist_ok=True)
    paths = {name: folder / column_file(name) for name in COLUMNS}
    lengths = dict.fromkeys(COLUMNS, 0)
    with ExitStack() as until_the_end:
        files = {name: until_the_end.enter_context(path.open("wb")) for name, path in paths.items()}
        for name, file in files.items():
            file.write(column_header(name, 0))
        for part in consecutive(parts):
            for name, file in files.items():
                values = getattr(part, name)
                file.write(values.tobytes())
                lengths[name] += len(values)
        for name, file in files.items():
            file.seek(0)
            file.write(column_header(name, lengths[name]))
            _sync(file)
    return tuple(IndexFile(column_file(name), path.stat().st_size, sha256(path)) for name, path in paths.items())


def _sync(file: IO[Any]) -> None:
    """On disk before the manifest names it, also if the machine stops."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_shard(path: Path, num_samples: int) -> Shard:
    """The manifest entry of a finished shard."""
    return Shard(name=path.name, samples=num_samples, bytes=path.stat().st_size, sha256=sha256(path))
