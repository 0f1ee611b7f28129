"""Builds shards in parts, one job each, and merges the parts into the folder that a single build would write.

Parts start where a single build starts a new shard because of `maxcount`. So the merged folder is the same byte for
byte, unless shards end earlier because of `maxsize`, or rows were rejected; then it has the same samples in the same
order, with other shard boundaries.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.build import build as build_shards
from data_tools.building.encoding import Rejected
from data_tools.building.inputs import count_all_rows
from data_tools.building.progress import Report
from data_tools.building.rejects import as_lines, check_rejects, read_rejects, write_rejects
from data_tools.building.shard_writer import SHARD_PATTERN
from data_tools.manifest import write_manifest
from mirage_ds.data.columns import Index
from mirage_ds.data.index import check_digests, load_index
from mirage_ds.data.shards import Manifest, Shard, load_manifest
from mirage_ds.errors import DataError
from mirage_ds.output_folder import new_folder

PART_NAME = "part.json"


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0) of `count`, and what identifies the build: its rows and options."""

    number: int
    count: int
    rows_sha256: str  # of the one input, or of the digests of several
    maxcount: int
    maxsize: int
    shuffle_seed: int | None = None

    @property
    def build(self) -> "Part":
        """What all parts of one build have in common."""
        return replace(self, number=0)


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8): the third of eight.

    Raises:
        DataError: the text has another form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise DataError(
            f"invalid part (--part {text}); allowed: I/N with I from 0 to N - 1; correct it, for example 0/8 for the "
            "first of eight"
        )
    return int(match[1]), int(match[2])


def folder_of(output: Path, number: int, count: int) -> Path:
    """The folder of a part of `output`: next to it, so that merging needs no copy."""
    return output.absolute().parent / f"{output.name}.part-{number:05d}-of-{count:05d}"


def rows_of(rows: Sequence[Path], number: int, count: int, maxcount: int) -> range:
    """The row numbers of a part: complete shards of `maxcount` rows, distributed as evenly as possible.

    Raises:
        DataError: the rows cannot be read, or are too few for this number of parts.
    """
    num_rows = count_all_rows(rows)
    num_shards = -(-num_rows // maxcount)
    if num_shards < count:
        raise DataError(
            f"more parts than shards ({', '.join(map(str, rows))}, --maxcount {maxcount}): rows: {num_rows}, shards: "
            f"{num_shards}, parts: {count}; each part needs at least one shard; use fewer parts, or set a smaller "
            "--maxcount"
        )
    first, last = (each * num_shards // count * maxcount for each in (number, number + 1))
    return range(first, min(last, num_rows))


def describe_part(
    rows: Sequence[Path], number: int, count: int, maxcount: int, maxsize: int, shuffle_seed: int | None = None
) -> Part:
    """A part of the rows as they are now."""
    digests = []
    for path in rows:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Part(number, count, digest, maxcount, maxsize, shuffle_seed)


def check_no_other_parts(output: Path, part: Part) -> None:
    """Refuses parts of another build next to `output`.

    Raises:
        DataError: the message names one of them.
    """
    name_of_part = re.compile(rf"{re.escape(output.name)}\.part-\d{{5,}}-of-\d{{5,}}")  # not an unfinished one
    for folder in sorted(output.absolute().parent.glob(f"{glob.escape(output.name)}.part-*-of-*")):
        if name_of_part.fullmatch(folder.name) and read_part(folder).build != part.build:
            raise DataError(
                f"a part of another build exists ({folder}): its rows or options differ; allowed: parts of this build; "
                f"remove the old parts with rm -r {output}.part-*"
            )


def build_part(
    rows: Path | Sequence[Path],
    output: Path,
    *,
    number: int,
    count: int,
    maxcount: int,
    maxsize: int,
    max_rejects: int = 0,
    workers: int = 1,
    shuffle_seed: int | None = None,
    report: Report = lambda rows, fraction: None,
) -> tuple[Path, Manifest, list[dict[str, Any]]]:
    """Builds one part in its own folder next to `output`, completely or not at all; an existing part is kept.

    Returns:
        the part's folder, its manifest, and the rejected rows.
    Raises:
        DataError: as `build`, or `rows_of`.
    """
    paths = [rows] if isinstance(rows, Path) else list(rows)
    numbers = rows_of(paths, number, count, maxcount)
    part = describe_part(paths, number, count, maxcount, maxsize, shuffle_seed)
    folder = folder_of(output, number, count)
    if folder.exists() and read_part(folder) == part:  # built by an earlier start of the job
        return folder, load_manifest(folder).manifest, as_lines(read_rejects(folder))
    manifest, rejects = build_shards(
        paths,
        folder,
        maxcount=maxcount,
        maxsize=maxsize,
        max_rejects=max_rejects,
        workers=workers,
        shuffle_seed=shuffle_seed,
        numbers=numbers,
        notes={PART_NAME: json.dumps(asdict(part)) + "\n"},
        report=report,
    )
    return folder, manifest, rejects


def read_part(folder: Path) -> Part:
    """The part in a folder.

    Raises:
        DataError: the folder is not a part.
    """
    path = folder / PART_NAME
    try:
        return Part(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"not a part of a build: {error} ({path}); expected what `mirage-data build --part I/N` wrote; name such a "
            "folder, or build the part again"
        ) from error


def order_parts(folders: list[Path]) -> list[Path]:
    """The folders in the order of their parts.

    Raises:
        DataError: a part is missing, given twice, or of another build.
    """
    parts = {folder: read_part(folder) for folder in folders}
    first = next(iter(parts.values()))
    for folder, part in parts.items():
        if part.build != first.build:
            raise DataError(
                f"parts of different builds ({folders[0]} and {folder}): {first.build} and {part.build}; rows and "
                "options must be equal; build the parts again"
            )
    numbers = sorted(part.number for part in parts.values())
    missing = sorted(set(range(first.count)) - set(numbers))
    if missing or len(numbers) != first.count:
        problem = f"part {missing[0]} is missing" if missing else "a part is given twice"
        raise DataError(
            f"{problem} (given: {', '.join(map(str, numbers))} of {first.count}); every part is needed exactly once; "
            "build a missing part with `mirage-data build --part I/N`"
        )
    return sorted(parts, key=lambda folder: parts[folder].number)


def merge(folders: list[Path], output: Path, *, max_rejects: int = 0) -> tuple[Manifest, list[dict[str, Any]]]:
    """Merges all parts of a build, in any order, into `output`, completely or not at all; the parts are not changed.

    Shards are hard-linked if the file system supports it, else copied. They are not read; `mirage-data check` does so.

    Args:
        max_rejects: number of unusable rows to tolerate, in all parts together.
    Returns:
        the manifest, and the rejected rows.
    Raises:
        DataError: parts of different builds, an incomplete shard or index, too many rejects, or an existing output.
    """
    rejects: list[Rejected] = []
    with new_folder(output) as new:
        shards: list[Shard] = []
        parts: list[tuple[int, Index]] = []
        for folder in order_parts(folders):
            part = load_manifest(folder)
            check_digests(part)
            parts.append((len(shards), load_index(part)))
            for shard in part.manifest.shards:
                name = SHARD_PATTERN % len(shards)
                _link(folder / shard.name, new / name)
                shards.append(replace(shard, name=name))
            rejects += read_rejects(folder)
        check_rejects(rejects, max_rejects)
        write_rejects(new, rejects)
        entries = (replace(entry, shard=entry.shard + first) for first, index in parts for entry in index)
        return write_manifest(new, shards, entries), as_lines(rejects)


def _link(shard: Path, new: Path) -> None:
    try:
        os.link(shard, new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(shard, new)
