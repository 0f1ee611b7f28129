"""The forms of an image in a row: all give the bytes of the same file; what is none of them is named."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from generated_rows import image_bytes

from mirage_ds.data.row_images import read_images
from mirage_ds.errors import DataError

IMAGE = image_bytes()
BASE64 = base64.b64encode(IMAGE).decode()


def test_every_form_gives_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "an image #1.png"
    path.write_bytes(IMAGE)
    forms = [
        path.name,
        str(path),
        path.as_uri(),
        f"file://localhost{quote(str(path))}",
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{quote(BASE64)}",
        f"data:image/png,{quote(IMAGE)}",
        IMAGE,
        {"bytes": BASE64},
        {"bytes": IMAGE, "path": "not/read.png"},
        {"bytes": None, "path": path.name},
        {"path": path.as_uri()},
    ]
    assert read_images(forms, "image_input", "here", tmp_path) == (IMAGE,) * len(forms)
    assert [read_images(form, "image_input", "here", tmp_path) for form in forms] == [(IMAGE,)] * len(forms)
    assert read_images(None, "image_input", "here", tmp_path) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "is not a path .*expected a path, a file:// URL"),
        ({"bytes": None, "path": None}, "is not a path"),
        ({"path": 5}, "5 is not a path"),
        ({"bytes": 5}, "5 is not base64"),
        ({"bytes": "\u00e9"}, "is not base64"),
        ("data:image/png;base64,A", "'A' is not base64: .*encode them again"),
        ("data:image/png;base64,!!!!", "is not base64"),
        ("data:image/png;base64", "has no data"),
        (
            "https://host/a.png",
            "'https://host/a.png' is on a server .*images are not downloaded; .*save the file and give",
        ),
        ("file://other-host/a.png", "is not a file of this machine"),
        ("file:a.png", "is not a file of this machine"),
        ("file:///none.png", "cannot be read: 'file:///none.png': No such file"),
        ("x" * 1000, "x: File name too long"),
    ],
)
def test_another_form_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"image_input.*{message}") as refused:
        read_images(value, "image_input", "rows.jsonl:7", tmp_path)
    assert "rows.jsonl:7" in str(refused.value)
    assert len(str(refused.value)) < 500
