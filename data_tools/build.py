"""JSONL rows with image files -> tar shards that plain webdataset reads, with manifest and index."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.manifest import describe_shard, scan_shard, write_manifest
from mirage_ds.data.sample import (
    Sample,
    num_image_blocks,
    num_latent_blocks,
    open_image,
    read_rows,
    to_members,
)
from mirage_ds.data.shards import IndexEntry, Manifest, Shard, new_folder

SHARD_PATTERN = "shard-%06d.tar"


def build(rows: Path, output: Path, *, maxcount: int, maxsize: int) -> Manifest:
    """Builds `output`, whole or not at all; the same rows and images give the same bytes.

    Args:
        rows: JSONL file; image paths are relative to its folder.
        maxcount: samples per shard at most.
        maxsize: bytes of members after which the next sample begins a new shard.
    Raises:
        DataError: a bad row (it names file:line), or an output that is there already.
    """
    with new_folder(output) as folder:
        facts = _write_shards(read_rows(rows), folder, maxcount, maxsize)
        shards: list[Shard] = []
        places: list[dict[str, Any]] = []
        for number, path in enumerate(sorted(folder.glob("*.tar"))):
            found = scan_shard(path)
            places += [{"key": key, "shard": number, "offset": offset, "size": size} for key, offset, size in found]
            shards.append(describe_shard(path, len(found)))
        index = [IndexEntry(**place, **fact) for place, fact in zip(places, facts, strict=True)]
        return write_manifest(folder, shards, index)


def _write_shards(
    samples: Iterable[tuple[str, Sample]], folder: Path, maxcount: int, maxsize: int
) -> list[dict[str, Any]]:
    """Writes the shards and returns what the index says of each sample, its place excepted."""
    # Imported here, as webdataset imports torch.
    from webdataset import ShardWriter

    facts = []
    # A constant mtime makes the bytes a function of the rows; % is the pattern's own character.
    pattern = f"{folder.absolute()}".replace("%", "%%") + f"/{SHARD_PATTERN}"
    with ShardWriter(pattern, maxcount=maxcount, maxsize=maxsize, encoder=False, mtime=0, verbose=0) as writer:
        for where, sample in samples:
            facts.append(_facts(sample, where))
            writer.write({"__key__": sample.key, **to_members(sample)})
    return facts


def _facts(sample: Sample, where: str) -> dict[str, Any]:
    return {
        "input_sizes": list(_sizes(sample.input_images, f"{where}, image_input")),
        "helper_sizes": list(_sizes(sample.helper_images, f"{where}, image_output")),
        "question_chars": len(sample.text_input),
        "answer_chars": len(sample.text_output),
        "image_blocks": num_image_blocks(sample.text_input, len(sample.input_images)),
        "latent_blocks": num_latent_blocks(sample.text_output, len(sample.helper_images)),
    }


def _sizes(images: Iterable[bytes], where: str) -> Iterator[tuple[int, int]]:
    for number, data in enumerate(images):
        yield open_image(data, f"{where} {number}").size
