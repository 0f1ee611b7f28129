"""`mirage-data check`: every kind of damage is found, with shard and key, and an intact folder has none."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generated_rows import image_bytes, write_rows
from index_formats import rewrite

from data_tools import cli
from data_tools.build import build
from data_tools.check import check
from mirage_ds.data.columns import IndexEntry
from mirage_ds.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 samples in shards of 4, 4 and 2."""
    build(write_rows(tmp_path / "rows"), tmp_path / "shards", maxcount=4, maxsize=10**9)
    return tmp_path / "shards"


def change_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert len(old) == len(new)
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def change_index(folder: Path, number: int, **changes: Any) -> None:
    def change(entries: list[IndexEntry]) -> list[IndexEntry]:
        entries[number] = replace(entries[number], **changes)
        return entries

    rewrite(folder, change)


def spoil_image(folder: Path) -> None:
    """A wrong byte in the pixels of one PNG."""
    image = image_bytes((112, 84), seed=8)  # 4_0.png: the first sample of the second shard
    change_bytes(folder / "shard-000001.tar", image, image[:60] + bytes([image[60] ^ 255]) + image[61:])
    rewrite(folder)


def spoil_slots(folder: Path) -> None:
    change_bytes(folder / "shard-000002.tar", b"Here is the map: <image>", b"Here <image> ... <image>")
    rewrite(folder)


def test_an_intact_folder_has_no_faults(folder: Path) -> None:
    assert list(check(folder)) == []


@pytest.mark.parametrize(
    ("spoil", "faults"),
    [
        (lambda f: change_bytes(f / "shard-000001.tar", b"step 5", b"step 6"), [r"sha256 .*shard-000001.tar"]),
        (lambda f: (f / "shard-000001.tar").unlink(), [r"the shard is missing .*shard-000001.tar"]),
        (
            lambda f: (f / "shard-000002.tar").write_bytes((f / "shard-000002.tar").read_bytes()[:700]),
            ["the shard has size 700 .*shard-000002.tar", "shard-000002.tar/000000008", "shard-000002.tar/000000009"],
        ),
        (lambda f: (f / "index" / "keys.npy").write_bytes(b""), [r"keys.npy does not match the manifest"]),
        (spoil_image, [r"cannot be decoded.*shard-000001.tar/000000004, image_input 0"]),
        (spoil_slots, [r"image slots in text_input: 2, input images: 1 .shard-000002.tar/000000008."]),
        (
            lambda f: change_index(f, 5, offset=512),
            [
                "starts at byte 512 .shard-000001.tar/000000005.",
                "starts at byte .*/000000006",
                "damaged.*shard-000001.tar/000000005",
            ],
        ),
        (lambda f: change_index(f, 3, key="000000007"), ["damaged shard: unexpected member.*000.tar/000000007"]),
        (
            lambda f: change_index(f, 9, shard=3),
            ["refers to shard 3 .000000009.; .*: 3;", "index: 1 .shard-000002.tar.; the manifest says 2"],
        ),
        (
            lambda f: rewrite(f, lambda entries: entries[:-1]),
            ["samples in the index: 9 .*/index.; the manifest says 10"],
        ),
        (
            lambda f: change_index(f, 2, helper_sizes=[(1, 2)], question_chars=7),
            [r"helper_sizes is \[\(140, 91\)\] .shard-000000.tar/000000002", "question_chars is .*/000000002"],
        ),
    ],
    ids=["byte", "missing", "short", "index", "image", "slots", "offset", "key", "shard", "fewer", "facts"],
)
def test_faults_are_found_and_reported(folder: Path, spoil: Callable[[Path], Any], faults: list[str]) -> None:
    spoil(folder)
    found = list(check(folder))
    assert len(found) == len(faults), found
    for message, pattern in zip(found, faults, strict=True):
        assert re.search(pattern, message), message


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        list(check(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="damaged manifest"):
        list(check(tmp_path))


def test_exit_codes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["mirage-data", "check", str(path)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    assert run(folder) == 0
    assert capsys.readouterr().out == f"0 faults in {folder}\n"
    spoil_image(folder)
    assert run(folder) == 1
    assert "shard-000001.tar/000000004" in capsys.readouterr().out
    assert run(folder.parent / "rows") == 2
    assert "no manifest.json" in capsys.readouterr().err
