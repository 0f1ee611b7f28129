"""Writes manifest.json and index.jsonl of finished shards; mirage_ds/data/shards.py and index.py read them."""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from mirage_ds.data.index import INDEX_NAME, IndexEntry
from mirage_ds.data.shards import FORMAT_VERSION, MANIFEST_NAME, Manifest, Shard

_TAR_BLOCK = 512  # bytes; a member's data is padded to a multiple


def scan_shard(path: Path) -> list[tuple[str, int, int]]:
    """Returns (key, offset, size in bytes) of each sample of a tar file, in the order of the file.

    A sample extends from the header of its first member (the pax header, if any) to the padding of its last member.
    """
    positions: list[tuple[str, int, int]] = []
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            key = info.name.partition(".")[0]
            end = info.offset_data + -(-info.size // _TAR_BLOCK) * _TAR_BLOCK
            start = positions.pop()[1] if positions and positions[-1][0] == key else info.offset
            positions.append((key, start, end - start))
    return positions


def write_manifest(folder: Path, shards: Sequence[Shard], index: Iterable[IndexEntry]) -> Manifest:
    """Writes index.jsonl and manifest.json to a folder of finished shards; equal contents give equal bytes."""
    # Without what is None: rows without a latent_size give the index, and so the digest, that they always gave.
    facts = ({name: value for name, value in asdict(entry).items() if value is not None} for entry in index)
    lines = "".join(json.dumps(fact) + "\n" for fact in facts).encode("ascii")
    (folder / INDEX_NAME).write_bytes(lines)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        num_samples=sum(shard.samples for shard in shards),
        index_sha256=hashlib.sha256(lines).hexdigest(),
        shards=tuple(shards),
    )
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="ascii")
    return manifest


def describe_shard(path: Path, num_samples: int) -> Shard:
    """The manifest entry of a finished shard."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(name=path.name, samples=num_samples, bytes=path.stat().st_size, sha256=digest)
