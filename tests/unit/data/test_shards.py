"""A damaged shard folder is a DataError that names the file; an output folder is complete or does not exist."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirage_ds.data.index import load_index
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.errors import DataError
from mirage_ds.output_folder import new_folder


def test_a_built_folder_loads(shards: ShardFolder) -> None:
    assert shards.num_samples == 10
    assert [shard.samples for shard in shards.manifest.shards] == [4, 4, 2]
    index = load_index(shards)
    assert [entry.key for entry in index] == [f"{number:09d}" for number in range(10)]
    assert [entry.shard for entry in index] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Makes a function that damages manifest.json by `change`."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest.json: No such file .*manifest\.json"),
        (
            lambda folder: (folder / "manifest.json").write_text("{"),
            r"damaged manifest: JSONDecodeError.*manifest\.json",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"damaged manifest: TypeError.*manifest\.json"),
        (edit(lambda manifest: manifest.update(format_version=3)), r"format version 3 .*reads 1 and 2"),
        (edit(lambda manifest: manifest.pop("format_version")), "damaged manifest: KeyError"),
        (edit(lambda manifest: manifest.update(more=1)), "damaged manifest: TypeError"),
        (edit(lambda manifest: manifest.pop("index")), "damaged manifest: KeyError"),
        (edit(lambda manifest: manifest["shards"][0].update(name=None)), "damaged manifest: TypeError"),
        (
            edit(lambda manifest: manifest["shards"][0].update(name="../a.tar")),
            r"damaged manifest: .*'\.\./a\.tar' is no",
        ),
        (edit(lambda manifest: manifest["shards"][0].update(name="a" * 5000)), "damaged manifest: .*aaa is no name"),
        (edit(lambda manifest: manifest["shards"][0].update(samples="4")), "damaged manifest: .*'4' is no number"),
        (edit(lambda manifest: manifest["index"][0].update(bytes=None)), "damaged manifest: .*None is no number"),
        (edit(lambda manifest: manifest["index"][0].update(sha256=None)), "damaged manifest: TypeError"),
        (edit(lambda manifest: manifest.update(num_samples=10.0)), r"damaged manifest: .*10\.0 is no number"),
        (edit(lambda manifest: manifest.update(upgraded_from=5)), "damaged manifest: TypeError"),
        (lambda folder: (folder / "index" / "keys.npy").unlink(), r"the index file is missing .*index/keys\.npy"),
        (
            edit(lambda manifest: manifest.update(num_samples=11)),
            "num_samples is 11, the samples of the shards add up to 10",
        ),
        (
            edit(lambda manifest: manifest.update(num_samples=0, shards=[])),
            "num_samples is 0, the samples of the shards add up to 0",
        ),
        (lambda folder: (folder / "shard-000001.tar").unlink(), r"the shard is missing .*shard-000001\.tar"),
        (lambda folder: (folder / "shard-000002.tar").write_bytes(b"x"), r"the shard has size 1 .*shard-000002\.tar"),
    ],
)
def test_a_damaged_folder_is_named(shards: ShardFolder, damage: Callable[[Path], Any], message: str) -> None:
    damage(shards.path)
    with pytest.raises(DataError, match=message):
        load_manifest(shards.path)


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "output"
    with new_folder(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()
    assert (output / "file").read_text() == "x"
    assert list(output.parent.iterdir()) == [output]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "output") as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    with new_folder(tmp_path / "output") as folder:
        (folder / "file").write_text("x")
    for output in (tmp_path / "output", tmp_path / "output" / "file"):
        with pytest.raises(DataError, match="the output already exists"), new_folder(output):
            pass
