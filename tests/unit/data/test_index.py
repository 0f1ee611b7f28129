"""The index of a folder: any entries come back as they were written, in both formats, and every damage is named.

Against the entries themselves, and against numpy, which reads the same files.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_formats import to_format_1

from data_tools import cli
from data_tools.check import check
from data_tools.manifest import write_manifest
from data_tools.upgrade import upgrade
from mirage_ds.data import columns
from mirage_ds.data.columns import IndexEntry
from mirage_ds.data.index import check_digests, load_index
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import Shard, ShardFolder, load_manifest, read_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError

COLUMNS = ("samples", "images", "latent_sizes", "keys")
INT32, INT64 = st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1)
SIZES = st.lists(st.tuples(INT32, INT32), max_size=3)


@st.composite
def any_entries(draw: st.DrawFn) -> list[IndexEntry]:
    entries = []
    for _ in range(draw(st.integers(1, 12))):
        blocks = draw(st.integers(0, 3))
        entries.append(
            IndexEntry(
                key=draw(st.text(max_size=6)),
                shard=draw(INT32),
                offset=draw(INT64),
                size=draw(INT64),
                input_sizes=draw(SIZES),
                helper_sizes=draw(SIZES),
                question_chars=draw(INT32),
                answer_chars=draw(INT32),
                image_blocks=draw(INT32),
                latent_blocks=blocks,
                latent_sizes=draw(st.none() | st.lists(INT32, min_size=blocks, max_size=blocks)) if blocks else None,
            )
        )
    return entries


def written(folder: Path, entries: list[IndexEntry]) -> ShardFolder:
    folder.mkdir()
    write_manifest(folder, [Shard("shard.tar", len(entries), 0, "")], iter(entries))
    return read_manifest(folder)


@settings(deadline=None)
@given(any_entries(), st.data())
def test_entries_come_back_in_both_formats(
    tmp_path_factory: pytest.TempPathFactory, entries: list[IndexEntry], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PART", data.draw(st.integers(1, 5)))  # entries that are written at a time
        folder = written(tmp_path_factory.mktemp("index") / "shards", entries)
        check_digests(folder)
        mapped = load_index(folder)
        in_memory = load_index(read_manifest(to_format_1(folder.path)))
    numbers = data.draw(st.lists(st.integers(0, len(entries) - 1)))
    for index in (mapped, in_memory):
        assert list(index) == entries
        assert [index[number] for number in range(-len(index), len(index))] == 2 * entries
        assert list(index[1::2]) == entries[1::2]
        assert [entry for part in index.parts(3) for entry in part] == entries
        assert list(index.take(np.array(numbers, dtype=np.int64))) == [entries[number] for number in numbers]
        assert index.samples["answer_chars"].tolist() == [entry.answer_chars for entry in entries]
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(mapped, name), getattr(in_memory, name))


def test_numpy_reads_the_files(shards: ShardFolder) -> None:
    files = {
        name: np.load(shards.path / "index" / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMNS
    }
    entries = list(load_index(shards))
    assert files["samples"]["offset"].tolist() == [entry.offset for entry in entries]
    assert files["images"].tolist() == [
        list(size) for entry in entries for size in (*entry.input_sizes, *entry.helper_sizes)
    ]
    assert files["keys"].tobytes().decode() == "".join(entry.key for entry in entries)


def test_an_unwritable_folder_of_columns_cannot_be_changed(shards: ShardFolder) -> None:
    with pytest.raises(ValueError, match="read-only"):
        load_index(shards).samples["offset"][0] = 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_values(dtype: str) -> Callable[[Path], None]:
    """Puts a numpy file of the same size with another type into the place of a column."""

    def damage(path: Path) -> None:
        size = path.stat().st_size
        np.save(path, np.zeros((size - 128) // np.dtype(dtype).itemsize, dtype))
        os.truncate(path, size)

    return damage


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(
    ("damage", "opened", "read"),
    [
        (Path.unlink, "is missing", "cannot be read: No such file"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "has size", "does not match the manifest"),
        (lambda path: os.truncate(path, path.stat().st_size + 8), "has size", "does not match the manifest"),
        (lambda path: os.truncate(path, 0), "has size 0", "does not match the manifest"),
        (other_values("<f8"), "is not that of", "does not match the manifest"),
        (other_values("<u8"), "is not that of", "does not match the manifest"),
        (flip, None, "does not match the manifest"),
    ],
    ids=["missing", "short", "long", "empty", "floats", "other integers", "flipped"],
)
def test_a_damaged_column_is_named(
    shards: ShardFolder, name: str, damage: Callable[[Path], Any], opened: str | None, read: str
) -> None:
    """Opening finds what it can without reading the values, the digests the rest, and `mirage-data check` all."""
    if name == "latent_sizes":  # which these rows do not give
        rows = [replace(entry, latent_sizes=[5]) for entry in load_index(shards)]
        write_manifest(shards.path, shards.manifest.shards, rows)
        shards = load_manifest(shards.path)
    path = shards.path / "index" / f"{name}.npy"
    damage(path)
    if opened is not None:
        with pytest.raises(DataError, match=rf"{opened}.*{path}"):
            load_index(shards)
    with pytest.raises(DataError, match=rf"{read}.*{path}"):
        check_digests(shards)
    assert [fault for fault in check(shards.path) if str(path) in fault]


def test_columns_that_contradict_each_other_are_no_crash(shards: ShardFolder) -> None:
    """Where digests were not compared, what is asked for is still in the files."""
    path = shards.path / "index" / "samples.npy"
    samples = np.load(path, mmap_mode="r+")
    samples["first_image"][3] = 2**40
    samples["input_images"][4] = -3
    samples["first_key_byte"][5] = -9
    samples.flush()
    for number in (3, 4, 5):
        with pytest.raises(DataError, match=f"the index contradicts itself .{path.parent}"):
            load_index(shards)[number]


def test_an_index_of_fewer_samples_is_refused(shards: ShardFolder) -> None:
    write_manifest(shards.path, shards.manifest.shards, list(load_index(shards))[:-1])
    with pytest.raises(DataError, match=r"samples in the index: 9 .*; the manifest says 10"):
        load_index(load_manifest(shards.path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_text(path.read_text().replace("0", "1", 1)), "does not match the manifest"),
    ],
)
def test_a_damaged_index_of_format_1_is_refused(
    shards: ShardFolder, damage: Callable[[Path], Any], message: str
) -> None:
    folder = read_manifest(to_format_1(shards.path))
    damage(shards.path / "index.jsonl")
    for read in (load_index, check_digests):
        with pytest.raises(DataError, match=rf"{message} .*index\.jsonl"):
            read(folder)


def test_an_upgraded_folder_is_the_same_data_set(
    shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same digest, so the same order, counted tokens and kept targets; the same samples, bit for bit."""
    new, old = shards, load_manifest(to_format_1(shutil.copytree(shards.path, tmp_path / "old")))
    upgraded = shutil.copytree(old.path, tmp_path / "upgraded")
    monkeypatch.setattr(sys, "argv", ["mirage-data", "upgrade", str(upgraded)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out == f"{upgraded} has format 2: 10 samples\n"
    folder = load_manifest(upgraded)
    assert folder.digest == old.digest != new.digest
    assert Plan(10, folder.digest, 7).samples(0, 25) == Plan(10, old.digest, 7).samples(0, 25)
    assert list(load_index(folder)) == list(load_index(old))
    assert list(map(SampleReader(folder), range(10))) == list(map(SampleReader(old), range(10)))
    assert list(check(upgraded)) == []
    for name in COLUMNS:
        assert (upgraded / "index" / f"{name}.npy").read_bytes() == (new.path / "index" / f"{name}.npy").read_bytes()
    assert not (upgraded / "index.jsonl").exists()
    with pytest.raises(DataError, match=r"has format 2 already .*; use it as it is"):
        upgrade(upgraded)


KILLED = """
import os, signal, sys
from pathlib import Path
from data_tools import manifest
from data_tools.upgrade import upgrade
steps, kill_at = [], int(sys.argv[2])
def counted(call):
    def step(*arguments, **options):
        steps.append(call)
        if len(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return step
os.fsync, Path.replace, Path.unlink = map(counted, (os.fsync, Path.replace, Path.unlink))
upgrade(Path(sys.argv[1]))
print(len(steps))
"""


def test_a_killed_upgrade_leaves_a_folder_that_works(shards: ShardFolder, tmp_path: Path) -> None:
    """Killed before it syncs the first column, before the manifest changes, and before the old index goes."""
    old = load_manifest(to_format_1(shards.path))
    entries, formats = list(load_index(old)), []
    for kill_at in (1, 6, 7):
        folder = shutil.copytree(old.path, tmp_path / str(kill_at))
        ended = subprocess.run([sys.executable, "-c", KILLED, folder, str(kill_at)], capture_output=True, text=True)
        assert ended.returncode == -9, ended.stderr
        left = load_manifest(folder)
        assert (list(load_index(left)), left.digest) == (entries, old.digest)
        formats.append(left.manifest.format_version)
        upgrade(folder)
        assert list(load_index(load_manifest(folder))) == entries
        assert not (folder / "index.jsonl").exists()
    assert formats == [1, 1, 2]
