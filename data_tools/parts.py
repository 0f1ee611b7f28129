"""A build in parts, each by a job of its own, and their merging into the folder that one build would have written.

Rows are cut where a single build begins a new shard because of `maxcount`. So the merged folder is the same byte for
byte, unless shards end earlier because of `maxsize`, or rows were left out; then it has the same samples in the same
order, in shards that are cut elsewhere.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.build import REJECTS_NAME, SHARD_PATTERN, Rejects
from data_tools.build import build as build_shards
from data_tools.manifest import write_manifest
from mirage_ds.data.index import IndexEntry, load_index
from mirage_ds.data.rows import count_rows
from mirage_ds.data.shards import Manifest, Shard, load_manifest
from mirage_ds.errors import DataError
from mirage_ds.output_folder import new_folder

PART_NAME = "part.json"


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0 on) of `count`, of one way to build one file of rows: what parts that fit have alike."""

    number: int
    count: int
    rows_sha256: str
    maxcount: int
    maxsize: int

    @property
    def build(self) -> "Part":
        """What all parts of one build share."""
        return replace(self, number=0)


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8): the third of eight.

    Raises:
        DataError: it is not understood.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise DataError(
            f"a part is not understood (--part {text}); allowed is I/N with I from 0 to N - 1, as 0/8 for the first of "
            "eight; correct it"
        )
    return int(match[1]), int(match[2])


def folder_of(output: Path, number: int, count: int) -> Path:
    """Where a part of `output` is written: beside it, so that merging needs no copy."""
    return output.absolute().parent / f"{output.name}.part-{number:05d}-of-{count:05d}"


def rows_of(rows: Path, number: int, count: int, maxcount: int) -> range:
    """The numbers of a part's rows: whole shards of `maxcount` rows, as evenly dealt as they can be.

    Raises:
        DataError: the rows cannot be read or are too few for so many parts.
    """
    num_rows = count_rows(rows)
    num_shards = -(-num_rows // maxcount)
    if num_shards < count:
        raise DataError(
            f"{count} parts are more than the {num_shards} shards that {num_rows} rows make ({rows}, --maxcount "
            f"{maxcount}); each part needs one; ask for fewer parts, or set a smaller --maxcount"
        )
    first, last = (each * num_shards // count * maxcount for each in (number, number + 1))
    return range(first, min(last, num_rows))


def describe_part(rows: Path, number: int, count: int, maxcount: int, maxsize: int) -> Part:
    """The part with the rows as they are now."""
    with rows.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Part(number, count, digest, maxcount, maxsize)


def check_no_other_parts(output: Path, part: Part) -> None:
    """Refuses parts that lie beside `output` and are of another build.

    Raises:
        DataError: it names one.
    """
    for folder in sorted(output.absolute().parent.glob(f"{glob.escape(output.name)}.part-*-of-*")):
        if read_part(folder).build != part.build:
            raise DataError(
                f"a part of another build is there ({folder}): its rows or options were others; allowed are parts of "
                f"this build; remove them with rm -r {output}.part-*"
            )


def build_part(
    rows: Path, output: Path, *, number: int, count: int, maxcount: int, maxsize: int, max_rejects: int = 0
) -> tuple[Path, Manifest, list[dict[str, Any]]]:
    """Builds one part, in a folder of its own beside `output`, whole or not at all; if it is there, nothing is done.

    Returns:
        the part's folder, its manifest, and the rows left out.
    Raises:
        DataError: as `build`, or `rows_of`.
    """
    numbers = rows_of(rows, number, count, maxcount)
    part = describe_part(rows, number, count, maxcount, maxsize)
    folder = folder_of(output, number, count)
    if folder.exists() and read_part(folder) == part:  # by an earlier start of the same job
        return folder, load_manifest(folder).manifest, read_rejects(folder)
    manifest, rejects = build_shards(
        rows,
        folder,
        maxcount=maxcount,
        maxsize=maxsize,
        max_rejects=max_rejects,
        numbers=numbers,
        notes={PART_NAME: json.dumps(asdict(part)) + "\n"},
    )
    return folder, manifest, rejects


def read_part(folder: Path) -> Part:
    """What a part's folder says of itself.

    Raises:
        DataError: it is no such folder.
    """
    path = folder / PART_NAME
    try:
        return Part(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"no part of a build: {error} ({path}); allowed is what `mirage-data build --part I/N` wrote; name "
            "such folders, or build the part again"
        ) from error


def order_parts(folders: list[Path]) -> list[Path]:
    """The folders in the order of their parts.

    Raises:
        DataError: one is missing, there twice, or of another build.
    """
    parts = {folder: read_part(folder) for folder in folders}
    first = next(iter(parts.values()))
    for folder, part in parts.items():
        if part.build != first.build:
            raise DataError(
                f"parts of two builds ({folders[0]} and {folder}): {first.build} and {part.build}; the rows and the "
                "options must be the same; build the parts again"
            )
    numbers = sorted(part.number for part in parts.values())
    missing = sorted(set(range(first.count)) - set(numbers))
    if missing or len(numbers) != first.count:
        problem = f"part {missing[0]} is missing" if missing else "a part is there twice"
        raise DataError(
            f"{problem} (of {first.count}; given are {', '.join(map(str, numbers))}); every part is needed once; build "
            "what is missing with `mirage-data build --part I/N`"
        )
    return sorted(parts, key=lambda folder: parts[folder].number)


def merge(folders: list[Path], output: Path, *, max_rejects: int = 0) -> tuple[Manifest, list[dict[str, Any]]]:
    """Joins all parts of a build, in any order, into `output`, whole or not at all; the parts stay as they are.

    Shards are linked where the file system knows hard links, else copied. They are not read: `mirage-data check` does.

    Args:
        max_rejects: rows that may be left out in all parts together.
    Returns:
        the manifest, and the rows left out.
    Raises:
        DataError: parts that are not one build's, a shard or index that is not whole, too many rejects, or an output
            that is there already.
    """
    rejects = Rejects()
    with new_folder(output) as new:
        shards: list[Shard] = []
        index: list[IndexEntry] = []
        for folder in order_parts(folders):
            part = load_manifest(folder)
            index += [replace(entry, shard=entry.shard + len(shards)) for entry in load_index(part)]
            for shard in part.manifest.shards:
                name = SHARD_PATTERN % len(shards)
                _link(folder / shard.name, new / name)
                shards.append(replace(shard, name=name))
            rejects.lines += read_rejects(folder)
        rejects.check(max_rejects)
        rejects.write(new)
        return write_manifest(new, shards, index), rejects.lines


def read_rejects(folder: Path) -> list[dict[str, Any]]:
    """The rows that a part left out."""
    path = folder / REJECTS_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _link(shard: Path, new: Path) -> None:
    try:
        os.link(shard, new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(shard, new)
