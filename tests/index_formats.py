"""Folders of shards whose index is of format 1, or was written with other entries. For tests."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from data_tools.manifest import describe_shard, write_manifest
from mirage_ds.data.columns import IndexEntry
from mirage_ds.data.index import load_index
from mirage_ds.data.shards import read_manifest


def to_format_1(folder: Path) -> Path:
    """Gives the folder the index and the manifest that versions before format 2 wrote; returns it."""
    read = read_manifest(folder)
    facts = ({name: value for name, value in asdict(entry).items() if value is not None} for entry in load_index(read))
    lines = "".join(json.dumps(fact) + "\n" for fact in facts).encode()
    for file in read.manifest.index:
        (folder / file.name).unlink()
    (folder / "index").rmdir()
    (folder / "index.jsonl").write_bytes(lines)
    manifest = {
        "format_version": 1,
        "num_samples": read.num_samples,
        "index_sha256": hashlib.sha256(lines).hexdigest(),
        "shards": [asdict(shard) for shard in read.manifest.shards],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def rewrite(folder: Path, change: Callable[[list[IndexEntry]], list[IndexEntry]] = lambda entries: entries) -> None:
    """Writes other entries and all digests again, as if the build itself had written the fault."""
    read = read_manifest(folder)
    shards = [describe_shard(folder / shard.name, shard.samples) for shard in read.manifest.shards]
    write_manifest(folder, shards, change(list(load_index(read))))
