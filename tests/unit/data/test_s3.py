"""Shards in a bucket of a real S3 server, in a process of its own: the same samples as from a disk."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
from dealt import in_order
from fsspec import filesystem

from mirage_ds.data import remote
from mirage_ds.data.places import Reading
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, make_loader
from mirage_ds.errors import DataError, StallError


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The server, with an empty bucket `data`."""
    port = launching.free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if "Running on" in (tmp_path / "log").read_text():
                break
            time.sleep(0.1)
        filesystem("s3", skip_instance_cache=True).mkdir("data")
        yield server
    finally:
        server.kill()
        server.wait()


def as_is(sample: Sample) -> Sample:
    return sample


def test_a_stream_from_s3_is_that_from_a_disk(
    shards: ShardFolder, bucket: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = filesystem("s3", skip_instance_cache=True)
    s3.put(str(shards.path), "data/some/shards", recursive=True)
    folder = load_manifest("s3://data/some/shards", Reading(tmp_path / "cache"))
    order = in_order(Share(0, 1, 2), shards, seed=3)
    got = make_loader(SampleReader(folder), as_is, list, order, num_workers=2)
    expected = make_loader(SampleReader(shards), as_is, list, order, num_workers=0)
    assert list(itertools.islice(got, 10)) == list(itertools.islice(expected, 10))

    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    s3.rm("data/some/shards/shard-000001.tar")
    with pytest.raises(DataError, match=r"the shard is missing \(s3://data/some/shards/shard-000001.tar\)"):
        load_manifest("s3://data/some/shards", Reading(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no manifest.json: .*\(s3://other/manifest.json\)"):
        load_manifest("s3://other", Reading(tmp_path / "cache"))
    bucket.kill()
    with pytest.raises(StallError, match=r"after 6 tries \(s3://data/some/shards/manifest.json\)"):
        load_manifest("s3://data/some/shards", Reading(tmp_path / "cache", timeout_s=1))
