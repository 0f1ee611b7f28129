"""What is kept of a server's shards: never other bytes than the server's, whatever happens to the folder."""

import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import Server, serving
from small_disk import SmallDisk, may_mount

from mirage_ds.data import cache as cache_module
from mirage_ds.data import remote
from mirage_ds.data.cache import GIB
from mirage_ds.data.places import Reading
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError, DiskFullError


@pytest.fixture
def server(shards: ShardFolder) -> Iterator[Server]:
    with serving(shards.path) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.002)


def samples(folder: ShardFolder) -> list[Sample]:
    read = SampleReader(folder)
    return [read(number) for number in range(folder.num_samples)]


def damage(folder: Path, rng: random.Random, files: str) -> str:
    """Does to one file of the cache what disks, people and killed processes do."""
    path = rng.choice(sorted(folder.glob(files)))
    size, kind = path.stat().st_size, rng.choice(["truncate", "flip", "remove", "zeros", "append", "replace"])
    if kind == "truncate":
        os.truncate(path, rng.randrange(size))
    elif kind == "remove":
        path.unlink()
    elif kind == "append":
        with path.open("ab") as file:
            file.write(rng.randbytes(rng.randrange(1, 60)))
    elif kind == "replace":
        path.write_bytes(rng.randbytes(rng.randrange(size)))
    else:
        content = bytearray(path.read_bytes())
        at = rng.choice([rng.randrange(size), size - rng.randrange(1, 60)])  # the records are at the end
        content[at : at + 40] = bytes([content[at] ^ 1 << rng.randrange(8)]) if kind == "flip" else bytes(40)
        path.write_bytes(content[:size])
    return f"{kind} {path.name}"


def test_a_damaged_cache_gives_the_samples_of_the_server(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    expected, rng = samples(shards), random.Random(7)
    for number in range(60):
        reading, done = Reading(tmp_path / "cache", timeout_s=5), []
        if number and rng.random() < 0.5:
            done.append(damage(tmp_path / "cache", rng, "*"))
        read = SampleReader(load_manifest(server.url, reading))
        for sample in rng.sample(range(10), 7):
            if rng.random() < 0.3 and any((tmp_path / "cache").glob("*.shard")):
                done.append(damage(tmp_path / "cache", rng, "*.shard"))  # the index is mapped
            assert read(sample) == expected[sample], (number, done)


def test_a_record_of_zeros_is_no_sample(
    shards: ShardFolder, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a power failure leaves it: the last of the four samples is missing, though there are four records."""
    read = SampleReader(load_manifest(server.url, Reading(tmp_path / "cache")))
    expected = samples(shards)
    assert [read(number) for number in (0, 1, 3)] == [expected[number] for number in (0, 1, 3)]
    (path,) = (tmp_path / "cache").glob("*.shard")
    content = path.read_bytes()
    path.write_bytes(content[: -cache_module.RECORD.itemsize] + bytes(cache_module.RECORD.itemsize))
    assert [read(number) for number in (2, 3)] == expected[2:4]
    assert "sha256" not in capfd.readouterr().err


def test_damage_on_the_server_is_named_or_healed(
    shards: ShardFolder, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the server sends in between, all samples of a shard are the built ones, or one of them is named."""
    expected, rng, messages = samples(shards), random.Random(3), []
    for number in range(40):
        folder = load_manifest(server.url, Reading(tmp_path / f"cache{number}", timeout_s=0.2))
        read, got, faulty = SampleReader(folder), {}, set()
        server.faults[:] = rng.choices([*["ok"] * 8, "cut", "short", "wrong", "noise", "500"], k=20)
        for sample in rng.sample(range(10), 10):
            try:
                got[sample] = read(sample)
            except DataError as error:
                messages.append(str(error))
                faulty.add(sample // 4)
        server.faults.clear()
        found = re.findall(r"shard-(\d+)\.tar: all of its samples were read", capfd.readouterr().err)
        faulty |= {int(shard) for shard in found}
        assert all(got[sample] == expected[sample] for sample in got if sample // 4 not in faulty), number
    assert messages
    assert all("shard-00000" in message for message in messages)


def test_the_limit_is_kept_and_what_was_used_last_stays(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    """Also with a limit that not even one shard fits into."""
    sizes = [shard.bytes for shard in shards.manifest.shards]
    limit = sizes[0] + sizes[2] + 12_000
    folder = load_manifest(server.url, Reading(tmp_path / "cache", cache_gib=limit / GIB))
    read = SampleReader(folder)

    def used() -> int:
        return sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").iterdir())

    for number in (0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 7, 8, 9, 0):
        assert read(number) == samples(shards)[number]
        assert used() <= limit + 8192  # blocks that the last range fills partly
    server.ranges.clear()
    read(0)
    assert not server.ranges
    tiny = load_manifest(server.url, Reading(tmp_path / "tiny", cache_gib=1000 / GIB))
    assert samples(tiny) == samples(shards)


def test_files_of_others_in_the_folder_stay(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    """They are old and larger than the limit."""
    others = [tmp_path / "cache" / name for name in ("folder/checkpoint.pt", "checkpoint.pt", "other.shard")]
    others[0].parent.mkdir(parents=True)
    for path in others:
        path.write_bytes(random.Random(1).randbytes(200_000))
        os.utime(path, (0, 0))
    os.utime(others[0].parent, (0, 0))
    read = SampleReader(load_manifest(server.url, Reading(tmp_path / "cache", cache_gib=100_000 / GIB)))
    expected = read(0)
    assert all(path.stat().st_size == 200_000 for path in others)
    server.ranges.clear()
    assert read(0) == expected
    assert not server.ranges


def test_a_folder_that_was_deleted_is_made_again(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    read = SampleReader(load_manifest(server.url, Reading(tmp_path / "cache")))
    shutil.rmtree(tmp_path / "cache")
    expected = read(0)
    server.ranges.clear()
    assert read(0) == expected
    assert not server.ranges


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace")
def test_a_full_disk_only_costs_the_cache(
    shards: ShardFolder, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    with SmallDisk(tmp_path / "disk", 2**20) as disk:
        folder = load_manifest(server.url, Reading(disk.outside / "cache"))
        read = SampleReader(folder)  # the index has room
        disk.fill(spare_bytes=0)
        for _ in range(2):
            assert [read(number) for number in range(10)] == samples(shards)
        assert capfd.readouterr().err.count("WARNING: what is read from servers is not kept") == 1
        for path in (disk.outside / "cache").iterdir():
            path.unlink()
        disk.empty()
        disk.fill(spare_bytes=0)
        with pytest.raises(DiskFullError, match=r"the disk is full .*data\.cache_dir"):
            SampleReader(folder)


def test_processes_share_what_they_read(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    """Four at a time, each in an order of its own; each range comes at most once for each, and the index once."""
    reading, expected = Reading(tmp_path / "cache"), samples(shards)

    def compare(seed: int) -> None:
        read = SampleReader(load_manifest(server.url, reading))
        for number in random.Random(seed).sample(range(10), 10):
            assert read(number) == expected[number]

    processes = [multiprocessing.get_context("fork").Process(target=compare, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    fetched = [asked for asked in server.ranges if asked.startswith("index") and not asked.endswith(" 0-511")]
    assert fetched
    assert len(set(fetched)) == len(fetched)
    server.ranges.clear()
    compare(9)
    assert {asked.split()[1] for asked in server.ranges} <= {"0-511"}


def test_a_folder_of_another_user_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "own_folder", lambda: tmp_path / "own")
    load_manifest(server.url)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(DataError, match=r"belongs to another user .*own\); allowed: .*data\.cache_dir"):
        load_manifest(server.url)


def test_a_manifest_names_no_file_outside_the_cache(shards: ShardFolder, server: Server, tmp_path: Path) -> None:
    folder = load_manifest(server.url, Reading(tmp_path / "cache"))
    shard = replace(shards.manifest.shards[0], sha256="../../outside")
    with pytest.raises(DataError, match=r"damaged manifest: '../../outside' is no sha256"):
        folder.place.read_range(shard, 0, 512)
