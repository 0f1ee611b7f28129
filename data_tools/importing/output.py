"""Writes rows.jsonl, and each image once, under the digest of its bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.importing.pictures import ImageFile, read_picture
from data_tools.importing.source_rows import LeftOutError, SourceRow
from data_tools.importing.turns import Row
from mirage_ds import strict_json
from mirage_ds.data.rows import read_question, read_row
from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks import choice

ROWS_NAME, IMAGES_NAME = "rows.jsonl", "images"
_IMAGE_FIELDS = ("image_input", "image_output")


class Ready(NamedTuple):
    """A row that has passed all checks."""

    line: str  # of rows.jsonl
    images: list[tuple[str, bytes]]  # of each its path in the folder, and the file
    num_tiny_parts: int  # of images: of fewer pixels than a token of the model


def make_ready(row: Row, source: SourceRow, *, choice_row: bool) -> Ready:
    """Reads the images of a row.

    Args:
        choice_row: the task choice must be able to score the row.

    Raises:
        DataError: an image cannot be read, or `mirage-data build` or `mirage evaluate` would refuse the row.
    """
    images = {
        name: [read_picture(picture, name, source) for picture in row[name]] for name in _IMAGE_FIELDS if name in row
    }
    _check(row | {name: [{"bytes": file.data} for file in files] for name, files in images.items()}, source)
    if choice_row:
        _check_choice(row)
    placed = {name: [(_path_of(file), file.data) for file in files] for name, files in images.items()}
    try:
        line = strict_json.dumps(row | {name: [path for path, _ in files] for name, files in placed.items()})
    except (TypeError, ValueError) as error:  # parquet has types that JSON has not
        raise LeftOutError("a field is no JSON", f"{error}; expected texts, numbers, lists and objects") from error
    num_tiny_parts = sum(file.is_tiny_part for files in images.values() for file in files)
    return Ready(line, [each for files in placed.values() for each in files], num_tiny_parts)


class Output:
    """The rows and images of a folder that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_rows, self.num_images, self.num_tiny_parts = folder, 0, 0, 0
        self.file = (folder / ROWS_NAME).open("w", encoding="utf-8")
        (folder / IMAGES_NAME).mkdir()

    def write(self, ready: Ready) -> None:
        """Writes a row, and those of its images that are not there yet."""
        for name, data in ready.images:
            path = self.folder / name
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                self.num_images += 1
        self.file.write(f"{ready.line}\n")
        self.num_rows += 1
        self.num_tiny_parts += ready.num_tiny_parts

    def close(self) -> None:
        self.file.close()


def _path_of(file: ImageFile) -> str:
    digest = hashlib.sha256(file.data).hexdigest()[:32]
    return f"{IMAGES_NAME}/{digest[:2]}/{digest}.{file.suffix}"


def _check_choice(row: Row) -> None:
    try:
        choice.score(row, "")
    except DataError as error:
        raise LeftOutError("the task choice cannot score it", str(error)) from error


def _check(row: dict[str, Any], source: SourceRow) -> None:
    turns = row.get("conversations")
    asks = isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("from") == "human"
    trained = not asks if turns is not None else row.get("text_output") is not None
    read = read_row if trained else read_question
    read(row, key="", where=source.where, folder=source.folder)
