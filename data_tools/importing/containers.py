"""The rows of the files that data sets are published in: JSON, JSONL, parquet, CSV, and folders of Hugging Face's
datasets on a disk. A row at a time.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.building.inputs import PARQUET_SUFFIXES, START, InTheirOrder
from data_tools.importing.json_lists import elements, is_list
from mirage_ds.data.rows import parse_row
from mirage_ds.errors import DataError, reason_of
from mirage_ds.paths import is_url, without_secrets

JSON_SUFFIXES, TABLE_SUFFIXES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *PARQUET_SUFFIXES, ".arrow", *TABLE_SUFFIXES)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # about the rows, with none
_BATCH_ROWS = 64  # of an arrow file in memory; a row may have its images
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as the hub names its files
_SPLIT_FOLDERS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


class RawRow(NamedTuple):
    """A row that was not looked at: JSON, or fields."""

    where: str  # file:line, or the file and its row
    file: Path
    content: bytes | Mapping[str, Any]
    fraction: float  # of all that is read, up to the end of this row


def files_of(sources: Sequence[str]) -> list[Path]:
    """The files with rows that the sources are, or have in them.

    Raises:
        DataError: a source is on a server or does not exist, or a folder has no such file, files of different kinds,
            or several splits.
    """
    return [file for source in sources for file in _files_of(source)]


def _files_of(source: str) -> list[Path]:
    if is_url(source):
        raise DataError(
            f"the source is on a server ({without_secrets(source)}); data sets are not downloaded; expected a file or "
            "a folder on a disk; download it, and name it here"
        )
    path = Path(source)
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        raise DataError(f"no such file or folder ({path}); expected {_expected()}; correct the path")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"a file of unknown kind ({path}); expected {_expected()}; name such a file, or rename it")
    return [path]


def _expected() -> str:
    return f"a file {', '.join(SUFFIXES)}, or a folder with some"


def _files_in(folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name not in _ABOUT and path.is_file()
    )
    if not files:
        raise DataError(f"no file with rows in the folder ({folder}); expected {_expected()}; name another folder")
    if len(kinds := {path.suffix.lower() for path in files}) > 1:
        raise DataError(
            f"files of different kinds in the folder ({folder}): {', '.join(sorted(kinds))}; expected one kind; name "
            f"the files, for example {files[0]}"
        )
    splits = sorted({split for path in files if (split := _split_of(path, folder))})
    if len(splits) > 1:
        raise DataError(
            f"several splits in the folder ({folder}): {', '.join(splits)}; expected one, as rows for tests do not "
            f"belong to those for training; name the files or the folder of one, for example {files[0]}"
        )
    state = folder / "state.json"
    if state.is_file():  # of a folder that datasets has saved: its files in their order
        named = [each["filename"] for each in _read_object(state).get("_data_files", [])]
        files = [folder / name for name in named] or files
    return files


def _split_of(path: Path, folder: Path) -> str | None:
    """Of which split a file is, if its name or a folder around it says so."""
    for parent in path.relative_to(folder).parts[:-1]:
        if parent.lower() in _SPLIT_FOLDERS:
            return parent
    found = _SPLIT.fullmatch(path.stem)
    if found and found[1] != "data":  # datasets' own name for the files of a split
        return found[1]
    return path.stem if path.stem.lower() in _SPLIT_FOLDERS else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the list of files: {reason_of(error)} ({path}); expected what datasets has saved; save the "
            "folder again, or name its files"
        ) from error
    return value if isinstance(value, dict) else {}


def read_rows(files: Sequence[Path]) -> Iterator[RawRow]:
    """All rows of the files, in order.

    Raises:
        DataError: a file cannot be read, is no container of rows, or has none; pyarrow is missing.
    """
    try:
        sizes = [max(path.stat().st_size, 1) for path in files]
    except OSError as error:
        raise DataError(f"cannot read the rows: {error.strerror} ({error.filename}); name an existing file") from error
    for number, path in enumerate(files):
        before, size = sum(sizes[:number]) / sum(sizes), sizes[number] / sum(sizes)
        for where, content, fraction in _reader_of(path)(path):
            yield RawRow(where, path, content, before + size * fraction)


_Read = Iterator[tuple[str, bytes | Mapping[str, Any], float]]


def _reader_of(path: Path) -> Callable[[Path], _Read]:
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:  # by its first character: many a .json has a row per line
        return _json_list if is_list(path) else _lines_or_parquet
    if suffix == ".arrow":
        return _arrow
    return _table if suffix in TABLE_SUFFIXES else _lines_or_parquet


def _lines_or_parquet(path: Path) -> _Read:
    for row in InTheirOrder([path]).read(START):
        if isinstance(row.content, bytes) and not row.content.endswith(b"\n"):
            _check_last_line(row.content, row.where)
        yield row.where, row.content, row.fraction


def _check_last_line(line: bytes, where: str) -> None:
    try:
        parse_row(line, where)
    except DataError as error:
        raise DataError(
            f"the file ends in the middle of a row ({where}): {error.__cause__}; every line must be one JSON object; "
            "copy or download the file again"
        ) from error


def _json_list(path: Path) -> _Read:
    size = path.stat().st_size
    for number, element in enumerate(elements(path)):
        yield f"{path}:{element.line}, row {number}", element.content, element.read_bytes / size


def _table(path: Path) -> _Read:
    """An empty cell counts as missing."""
    csv.field_size_limit(sys.maxsize)  # an image in base64 is longer than the reader's usual limit
    size = path.stat().st_size
    try:
        with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for row in rows:
                fields = {name: value for name, value in row.items() if name is not None and value}
                yield f"{path}:{rows.line_num}", fields, file.tell() / size
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"cannot read the rows: {reason_of(error)} ({path}); expected a table in UTF-8 with the names of the "
            "columns in its first line; write it again"
        ) from error


def _arrow(path: Path) -> _Read:
    """As datasets saves them: a stream of record batches. A column that is null in a row counts as missing there."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"rows in arrow files need pyarrow, which is not installed ({path}); allowed without it: JSON and CSV; "
            "install the extra: pip install 'mirage_ds[parquet]'"
        ) from error
    number, size = 0, path.stat().st_size
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        fields = {name: value for name, value in row.items() if value is not None}
                        yield f"{path}, row {number}", fields, file.tell() / size
                        number += 1
    except (OSError, ValueError, OverflowError) as error:  # pyarrow's errors are of these
        raise DataError(
            f"cannot read the rows: {reason_of(error)} ({path}); expected an arrow file that datasets has saved; save "
            "the folder again, or write parquet"
        ) from error
