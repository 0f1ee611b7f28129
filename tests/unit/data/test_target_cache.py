"""The file of latent targets: what was written completely comes back, and nothing else does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.target_cache import TargetCache

LATENT_SIZE, LATENT_VALUES = 3, 50_000 + 1
VALUES = LATENT_SIZE * LATENT_VALUES  # several pages, so that two writers can mix
SLOT_BYTES = 4 + 4 * VALUES
LIMIT = 2**30

# Another process, which writes one slot again and again, all ones or all twos.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.target_cache import TargetCache
folder, targets, size, values = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
facts, limit = {"tower": "a"}, 2**30
cache = TargetCache.open(targets, load_manifest(folder), facts, latent_size=size, values=values, limit_bytes=limit)
data = [np.full(size * values, number, np.float32).tobytes() for number in (1, 2)]
cache.write([1], data[:1])
print("ready", flush=True)
while True:
    for each in data:
        cache.write([1], [each])
"""


@pytest.fixture
def cache(shards: ShardFolder, tmp_path: Path) -> TargetCache:
    return opened(shards, tmp_path)


def opened(shards: ShardFolder, tmp_path: Path, *, tower: str = "a", limit_bytes: int = LIMIT) -> TargetCache:
    sizes = {"latent_size": LATENT_SIZE, "values": LATENT_VALUES, "limit_bytes": limit_bytes}
    return TargetCache.open(tmp_path / "targets", shards, {"tower": tower}, **sizes)


def values(*numbers: int) -> list[bytes]:
    return [np.full(VALUES, number, np.float32).tobytes() for number in numbers]


def test_what_was_written_comes_back(cache: TargetCache) -> None:
    """Each of the 10 samples has one helper image; a sample counts only with all of its images."""
    assert [list(cache.slots(number)) for number in (0, 9)] == [[0], [9]]
    assert cache.read(range(0, 1)) is None
    cache.write([7, 4], values(7, 4))
    assert [cache.read(range(slot, slot + 1)) for slot in (4, 5, 7)] == [*values(4), None, *values(7)]
    assert cache.read(range(4, 6)) is None
    cache.write([5], values(5))
    assert cache.read(range(4, 6)) == b"".join(values(4, 5))
    assert cache.read(range(4, 4)) is None
    assert cache.path.stat().st_blocks * 512 < 5 * SLOT_BYTES  # of eight slots: the file is sparse


def test_samples_without_a_helper_image_and_with_two_of_different_sizes(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path / "a.targets", np.array([0, 1, 1, 3]), np.array([0, 12, 24, 32]), 3)
    assert [cache.slots(number) for number in range(3)] == [range(0, 1), range(1, 1), range(1, 3)]
    cache.write([0, 1, 2], [b"abcdefgh", b"ABCDEFGH", b"1234"])
    assert [cache.read(cache.slots(number)) for number in range(3)] == [b"abcdefgh", None, b"ABCDEFGH1234"]


def test_a_slot_that_was_not_written_completely_is_not_there(cache: TargetCache) -> None:
    """Killed in a write: the first half, with the checksum, is new. Cut off: the second half is missing, or all."""
    cache.write([0, 1, 2, 9], values(1, 2, 3, 4))
    with cache.path.open("r+b") as file:
        file.seek(9 * SLOT_BYTES)
        half = file.read(SLOT_BYTES // 2)
        file.seek(SLOT_BYTES)
        file.write(half)
    assert [cache.read(range(slot, slot + 1)) for slot in range(3)] == [*values(1), None, *values(3)]
    for size in (2 * SLOT_BYTES + 10, 2 * SLOT_BYTES, 0):
        with cache.path.open("r+b") as file:
            file.truncate(size)
        assert cache.read(range(2, 3)) is None
    assert cache.read(range(0, 1)) is None
    cache.write([1], values(4))
    assert cache.read(range(1, 2)) == values(4)[0]
    cache.path.unlink()
    assert cache.read(range(1, 2)) is None
    cache.write([1], values(5))
    assert cache.read(range(1, 2)) == values(5)[0]


def test_another_process_writes_the_same_slot(cache: TargetCache, shards: ShardFolder, tmp_path: Path) -> None:
    """What is read is one of its two contents, complete, or nothing. Without checksums, a tenth was mixed."""
    command = [sys.executable, "-c", WRITER, *map(str, (shards.path, tmp_path / "targets", LATENT_SIZE, LATENT_VALUES))]
    written = set(values(1, 2))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "ready\n"
            found = {cache.read(range(1, 2)) for _ in range(500)}
        finally:
            writer.kill()
    assert found - {None} == written


def test_the_size_is_limited(shards: ShardFolder, tmp_path: Path) -> None:
    cache = opened(shards, tmp_path, limit_bytes=4 * (4 * VALUES + 4) + 100)
    assert cache.num_slots == 4
    cache.write(range(10), values(*range(10)))
    assert cache.path.stat().st_size == 4 * SLOT_BYTES
    assert [cache.read(range(slot, slot + 1)) is not None for slot in range(10)] == [True] * 4 + [False] * 6
    assert cache.read(range(3, 5)) is None


def test_what_decides_the_targets_decides_the_file(cache: TargetCache, shards: ShardFolder, tmp_path: Path) -> None:
    cache.write([0], values(1))
    assert opened(shards, tmp_path).read(range(0, 1)) == values(1)[0]
    assert opened(shards, tmp_path, tower="b").read(range(0, 1)) is None
    other_shards = ShardFolder(shards.place, shards.manifest, "another digest")
    assert opened(other_shards, tmp_path).read(range(0, 1)) is None
    assert len(list((tmp_path / "targets").glob("*.targets"))) == 1
    assert '"tower": "b"' in opened(shards, tmp_path, tower="b").path.with_suffix(".json").read_text()


def test_a_full_disk_is_a_warning(cache: TargetCache, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes nothing, and reads as zeros."""
    cache.path.symlink_to("/dev/full")
    for _ in range(3):
        cache.write([1], values(1))
    assert cache.read(range(1, 2)) is None
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"WARNING: latent targets were not kept ({cache.path}): No space left on device")
    assert "the run continues; check the disk of model.cache_targets" in warning
