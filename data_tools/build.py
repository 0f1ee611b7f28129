"""Builds tar shards that plain webdataset reads, with manifest and index, from JSONL rows and image files."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_tools.manifest import describe_shard, scan_shard, write_manifest
from mirage_ds.data.images import decode
from mirage_ds.data.index import IndexEntry
from mirage_ds.data.rows import Sample, num_image_blocks, num_latent_blocks, read_rows
from mirage_ds.data.shard_samples import to_members
from mirage_ds.data.shards import Manifest, Shard
from mirage_ds.errors import DataError
from mirage_ds.output_folder import new_folder

SHARD_PATTERN = "shard-%06d.tar"
REJECTS_NAME = "rejects.jsonl"
NUM_REJECTS_LISTED = 5  # in the message


class Rejects:
    """The rows that cannot be used: location, id and reason."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, where: str, row_id: Any, error: DataError) -> None:
        self.lines.append({"where": where, "id": row_id, "reason": str(error)})

    def check(self, max_rejects: int) -> None:
        """Refuses more than `max_rejects`.

        Raises:
            DataError: the message lists the first few.
        """
        if len(self.lines) <= max_rejects:
            return
        listed = "".join(f"\n  - {line['reason']}" for line in self.lines[:NUM_REJECTS_LISTED])
        more = len(self.lines) - NUM_REJECTS_LISTED
        raise DataError(
            f"unusable rows: {len(self.lines)}{listed}" + (f"\n  - and {more} more" if more > 0 else "") + "\n"
            f"nothing was written; fix the rows, or raise --max-rejects (now {max_rejects})"
        )

    def write(self, folder: Path) -> None:
        """Writes rejects.jsonl, if there are any."""
        if self.lines:
            (folder / REJECTS_NAME).write_text("".join(json.dumps(line) + "\n" for line in self.lines))


def build(
    rows: Path,
    output: Path,
    *,
    maxcount: int,
    maxsize: int,
    max_rejects: int = 0,
    numbers: range | None = None,
    notes: Mapping[str, str] | None = None,
) -> tuple[Manifest, list[dict[str, Any]]]:
    """Builds `output`, completely or not at all; equal rows and images give equal bytes.

    Args:
        rows: JSONL file; image paths are relative to its folder.
        maxcount: maximum samples per shard.
        maxsize: bytes of members after which the next sample starts a new shard.
        max_rejects: number of unusable rows to tolerate; they are listed in rejects.jsonl.
        numbers: the rows to use, counted from 0; None: all.
        notes: additional small files in the folder, {name: text}.
    Returns:
        the manifest, and the rejected rows.
    Raises:
        DataError: too many unusable rows (the message has file:line), no usable row, or an existing output.
    """
    rejects = Rejects()
    with new_folder(output) as folder:
        facts = _write_shards(_usable(rows, rejects, numbers), folder, maxcount, maxsize)
        rejects.check(max_rejects)
        if not facts:
            raise DataError(
                f"no usable row ({rows}); shards need at least one; fix the rows (--max-rejects 0 lists them)"
            )
        rejects.write(folder)
        for name, text in (notes or {}).items():
            (folder / name).write_text(text)
        shards: list[Shard] = []
        positions: list[dict[str, Any]] = []
        for number, path in enumerate(sorted(folder.glob("*.tar"))):
            found = scan_shard(path)
            positions += [{"key": key, "shard": number, "offset": offset, "size": size} for key, offset, size in found]
            shards.append(describe_shard(path, len(found)))
        index = [IndexEntry(**position, **fact) for position, fact in zip(positions, facts, strict=True)]
        return write_manifest(folder, shards, index), rejects.lines


def _usable(rows: Path, rejects: Rejects, numbers: range | None) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """The usable rows, each with its facts; the others go to `rejects`."""
    for where, sample in read_rows(rows, rejects, numbers):
        try:
            facts = facts_of(sample, where)
        except DataError as error:
            rejects(where, sample.extra.get("id"), error)
        else:
            yield sample, facts


def _write_shards(
    samples: Iterable[tuple[Sample, dict[str, Any]]], folder: Path, maxcount: int, maxsize: int
) -> list[dict[str, Any]]:
    """Writes the shards; returns the index entry of each sample, without its position."""
    samples = iter(samples)
    first = list(islice(samples, 1))
    # Imported here, as webdataset imports torch, which takes seconds: a wrong path is reported before that.
    from webdataset import ShardWriter

    facts = []
    # With a constant mtime, the bytes depend on the rows only; % is special in the pattern.
    pattern = f"{folder.absolute()}".replace("%", "%%") + f"/{SHARD_PATTERN}"
    with ShardWriter(pattern, maxcount=maxcount, maxsize=maxsize, encoder=False, mtime=0, verbose=0) as writer:
        for sample, fact in chain(first, samples):
            facts.append(fact)
            writer.write({"__key__": sample.key, **to_members(sample)})
    return facts


def facts_of(sample: Sample, where: str) -> dict[str, Any]:
    """The index entry of a sample, without its position; decodes all its images.

    Raises:
        DataError: an image cannot be decoded; the message has `where`.
    """
    return {
        "input_sizes": list(_sizes(sample.input_images, f"{where}, image_input")),
        "helper_sizes": list(_sizes(sample.helper_images, f"{where}, image_output")),
        "question_chars": len(sample.text_input),
        "answer_chars": len(sample.text_output),
        "image_blocks": num_image_blocks(sample.text_input, len(sample.input_images)),
        "latent_blocks": num_latent_blocks(sample.text_output, len(sample.helper_images)),
        "latent_sizes": list(sample.latent_sizes) or None,
    }


def _sizes(images: Iterable[bytes], where: str) -> Iterator[tuple[int, int]]:
    for number, data in enumerate(images):
        yield decode(data, f"{where} {number}").size
