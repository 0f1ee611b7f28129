"""Builds tar shards that plain webdataset reads, with manifest and index, from rows and their images.

building/inputs.py reads rows, building/encoding.py makes samples of them in the processes of building/workers.py, and
building/shard_writer.py cuts them into shards, in the order of the rows: whatever the number of workers and however
often a build was ended and continued (building/unfinished.py), the bytes are the same.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data_tools.building import inputs
from data_tools.building.encoding import Rejected, encode_rows
from data_tools.building.inputs import InTheirOrder, RawRow, Rows
from data_tools.building.progress import Report
from data_tools.building.rejects import as_lines, check_rejects, read_rejects, write_rejects
from data_tools.building.shard_writer import ShardWriter
from data_tools.building.shuffled import Shuffled, check_can_shuffle
from data_tools.building.unfinished import Unfinished, unfinished_build
from data_tools.building.workers import in_order
from data_tools.manifest import write_manifest
from mirage_ds.data.shards import Manifest, read_manifest
from mirage_ds.errors import DataError
from mirage_ds.paths import check_temporary_folder

TASK_ROWS, TASK_BYTES = 16, 2**22  # a task of a worker ends with the row that reaches one of them
LOOK_ON_ROWS = 1000  # after one reject too many, for more of them to list

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Options:
    """What the bytes of the shards depend on, besides the rows."""

    maxcount: int  # maximum samples per shard
    maxsize: int  # bytes of members after which the next sample starts a new shard
    shuffle_seed: int | None = None  # None: rows stay in their order
    val_fraction: float | None = None
    first_row: int = 0  # in the order of the build
    end_row: int | None = None  # None: all


def val_folder(output: Path) -> Path:
    """Where the samples of --val-fraction go."""
    return output.absolute().with_name(f"{output.name}-val")


def build(
    rows: Path | Sequence[Path],
    output: Path,
    *,
    maxcount: int,
    maxsize: int,
    max_rejects: int = 0,
    workers: int = 1,
    shuffle_seed: int | None = None,
    val_fraction: float | None = None,
    numbers: range | None = None,
    notes: Mapping[str, str] | None = None,
    report: Report = lambda rows, fraction: None,
) -> tuple[Manifest, list[dict[str, Any]]]:
    """Builds `output`; equal rows and images give equal bytes. Continues what an earlier, ended start has left.

    Args:
        rows: JSONL or parquet file, or several, which are read one after the other; image paths are relative to the
            folder of their file.
        maxcount: maximum samples per shard.
        maxsize: bytes of members after which the next sample starts a new shard.
        max_rejects: number of unusable rows to tolerate; they are listed in rejects.jsonl.
        workers: number of processes; 1: this one alone.
        shuffle_seed: rows are put into a pseudo-random order first; None: they stay in theirs.
        val_fraction: rows whose key has a hash below this part of all hashes go to `val_folder(output)`.
        numbers: the rows to use, counted from 0 in the order of the build; None: all.
        notes: additional small files in the folder, {name: text}.
        report: see `Report`.
    Returns:
        the manifest of `output`, and the rejected rows.
    Raises:
        DataError: too many unusable rows (the message has file:line), no usable row, an existing output, or an
            unfinished one of other options.
        ConfigError: the path of the folder for temporary files is too long for more than one worker.
        OwnerError: another build writes this output.
        MemoryFullError: a worker was killed.
    """
    paths = [rows] if isinstance(rows, Path) else list(rows)
    first, end = (0, None) if numbers is None else (numbers.start, numbers.stop)
    options = Options(maxcount, maxsize, shuffle_seed, val_fraction, first, end)
    inputs.check_different(paths)
    if shuffle_seed is not None:
        check_can_shuffle(paths)
    if workers > 1:
        check_temporary_folder(without_workers="--workers 1")
    outputs = {TRAIN: output} | ({} if val_fraction is None else {VAL: val_folder(output)})
    with unfinished_build(outputs) as unfinished:
        fingerprint = inputs.fingerprint(paths)
        unfinished.begin(fingerprint, asdict(options))
        if not unfinished.is_complete:
            order = InTheirOrder(paths) if shuffle_seed is None else Shuffled(paths, shuffle_seed, unfinished.path)
            with ExitStack() as until_the_end:
                writers = {
                    name: until_the_end.enter_context(closing(_writer_of(unfinished, name, options)))
                    for name in outputs
                }
                _write_shards(order, writers, options, workers, max_rejects, unfinished, report)
            if inputs.fingerprint(paths) != fingerprint:
                raise DataError(
                    f"the rows changed while they were read ({', '.join(map(str, paths))}); expected files that stay "
                    "as they are; build again when they are complete"
                )
            _describe(unfinished, writers, paths, notes or {})
        unfinished.finish()
    return read_manifest(output).manifest, as_lines(read_rejects(output))


def _writer_of(unfinished: Unfinished, name: str, options: Options) -> ShardWriter:
    return ShardWriter(
        unfinished.folder(name), unfinished.facts(name), maxcount=options.maxcount, maxsize=options.maxsize
    )


def _write_shards(
    order: Rows,
    writers: Mapping[str, ShardWriter],
    options: Options,
    workers: int,
    max_rejects: int,
    unfinished: Unfinished,
    report: Report,
) -> None:
    """Writes all shards that are missing.

    Raises:
        DataError: more than `max_rejects` rows cannot be used. Where that is certain, no more samples are written.
    """
    check_rejects(_in_order_of_rows(writers), max_rejects)  # of an earlier start
    num_rejects = sum(len(writer.rejects) for writer in writers.values())
    end: int | None = None
    start = min((writer.next for writer in writers.values()), key=lambda place: place.rows)
    for task, results in in_order(encode_rows, _tasks(order.read(start), writers, options), workers):
        for row, result in zip(task, results, strict=True):
            writer = writers[_name_of(row, options)]
            if isinstance(result, Rejected):
                writer.reject(row, result)
                num_rejects += 1
                if num_rejects == max_rejects + 1:
                    end = row.after.rows + LOOK_ON_ROWS
            elif end is None and writer.add(row, result):
                unfinished.check_owner()
            if row.after.rows == end:
                check_rejects(_in_order_of_rows(writers), max_rejects, rows_read=end)
        report(row.after.rows, _fraction(row, options))
    check_rejects(_in_order_of_rows(writers), max_rejects)
    for writer in writers.values():
        writer.finish_shard()


def _tasks(rows: Iterator[RawRow], writers: Mapping[str, ShardWriter], options: Options) -> Iterator[list[RawRow]]:
    """The rows that are not in complete shards, a few at a time."""
    task: list[RawRow] = []
    for row in rows:
        if options.end_row is not None and row.after.rows > options.end_row:
            break
        if row.after.rows > max(options.first_row, writers[_name_of(row, options)].next.rows):
            task.append(row)
        if len(task) == TASK_ROWS or sum(each.num_bytes for each in task) >= TASK_BYTES:
            yield task
            task = []
    if task:
        yield task


def _name_of(row: RawRow, options: Options) -> str:
    """The output of a row: by its key alone, so that it stays there when rows are added at the end."""
    if options.val_fraction is None:
        return TRAIN
    digest = hashlib.sha256(row.key.encode()).digest()
    return VAL if int.from_bytes(digest[:8]) < options.val_fraction * 2**64 else TRAIN


def _fraction(row: RawRow, options: Options) -> float:
    if options.end_row is None:
        return row.fraction
    return (row.after.rows - options.first_row) / (options.end_row - options.first_row)


def _in_order_of_rows(writers: Mapping[str, ShardWriter]) -> list[Rejected]:
    rejects = chain.from_iterable(writer.rejects for writer in writers.values())
    return [rejected for _, rejected in sorted(rejects, key=lambda each: each[0])]


def _describe(
    unfinished: Unfinished, writers: Mapping[str, ShardWriter], paths: Sequence[Path], notes: Mapping[str, str]
) -> None:
    """Writes all that lies beside the shards. Without a row for it there is no second output."""
    if not writers[TRAIN].shards:
        raise DataError(
            f"no usable row ({', '.join(map(str, paths))}); shards need at least one; fix the rows (--max-rejects 0 "
            "lists them)"
        )
    for name, writer in writers.items():
        folder = unfinished.folder(name)
        if writer.shards:
            write_manifest(folder, writer.shards, writer.entries())
        else:
            folder.rmdir()
    write_rejects(unfinished.folder(TRAIN), _in_order_of_rows(writers))
    for name, text in notes.items():
        (unfinished.folder(TRAIN) / name).write_text(text)
