"""A row as it was published: its fields, which of them were read, and its images, which are not opened here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_ds.errors import DataError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

# How files of images begin in base64: PNG, JPEG, GIF, WEBP and BMP.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk")
_SHORTEST_BASE64 = 256  # characters that no path of a file has after such a start: its name has at most 255 bytes


class LeftOutError(DataError):
    """A row that cannot be imported."""

    def __init__(self, reason: str, detail: str) -> None:
        """
        Args:
            reason: the same words for all rows that have it.
            detail: what is different in each row, and what was expected.
        """
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """An image of a row, or a part of it."""

    value: Any  # as row_images.py of mirage_ds/data reads it
    box: Box | None = None  # the part
    box_unit: str = "pixels"  # or "sides": from 0 to 1 of the width and the height
    margin: float = 0.0  # around the box, as a part of its width on the left and right, and of its height
    size_px: tuple[float, float] | None = None  # width and height that the image must have


@dataclass
class SourceRow:
    """A row of a file."""

    where: str
    folder: Path  # where paths of images begin
    fields: Mapping[str, Any]
    around: Sequence[Path] = ()  # folders in which its images may lie, beside `folder`
    used: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)  # what stands in its turns and was not read, such as messages.name

    def get(self, name: str) -> Any:
        """The value of a field; None if it is missing."""
        self.used.add(name)
        return self.fields.get(name)

    def text(self, name: str) -> str:
        """A text that is not empty; a number is one too.

        Raises:
            LeftOutError: it is missing, empty, or something else.
        """
        value = self.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            found = "it is missing" if value is None else f"it is {value!r:.80}"
            raise LeftOutError(f"no text in {name}", f"{found}; expected a text that is not empty")
        return value

    def picture(self, name: str) -> Picture:
        """The image of a field.

        Raises:
            LeftOutError: there is none, or there are several.
        """
        pictures = self.pictures(name)
        if len(pictures) != 1:
            raise LeftOutError(f"not one image in {name}", f"images: {len(pictures)}; expected 1")
        return pictures[0]

    def pictures(self, name: str) -> list[Picture]:
        """The image or the images of a field; none if it is missing."""
        value = self.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        return [to_picture(each) for each in values]

    def numbered_pictures(self, stem: str) -> dict[str, Picture]:
        """The images of the fields `stem` + number, in the order of the numbers, by the field's name."""
        names = [name for name in self.fields if name.startswith(stem) and name.removeprefix(stem).isdecimal()]
        names.sort(key=lambda name: int(name.removeprefix(stem)))
        return {name: self.picture(name) for name in names if self.get(name) is not None}

    def kept(self, *names: str) -> dict[str, Any]:
        """Fields that are kept as they are, if the row has them."""
        return {name: self.get(name) for name in names if self.fields.get(name) is not None}

    def ignored(self) -> Iterator[str]:
        """The fields that were not read, and those of its turns."""
        yield from (name for name in self.fields if name not in self.used)
        yield from sorted(self.unread)


def to_picture(value: Any) -> Picture:
    """The image that a value is: as Picture.value, or base64 without anything around it."""
    if isinstance(value, str) and len(value) >= _SHORTEST_BASE64 and value.startswith(_BASE64_STARTS):
        return Picture({"bytes": "".join(value.split())})
    return Picture(value)
