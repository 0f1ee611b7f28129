"""Shards on a server: the same samples as from a disk, whatever the server does for a while; what it does for ever is
named. The server is a real one, on loopback."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from dealt import in_order
from file_server import FAULTS, Server, serving
from transformers import PreTrainedTokenizerBase

from data_tools import cli
from data_tools.check import check
from launch.doctor.recipe_checks import check_shards
from mirage_ds.config import Config
from mirage_ds.data import cache, remote
from mirage_ds.data.counts import load_counts
from mirage_ds.data.encode import Encoder
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.places import Reading
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, encode_read, first_usable, make_loader
from mirage_ds.early_checks import check_inputs
from mirage_ds.errors import ConfigError, DataError, StallError, WrongShardError
from mirage_ds.recipe import load_config

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.fixture
def server(shards: ShardFolder) -> Iterator[Server]:
    with serving(shards.path) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.005)


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(tmp_path / "cache", timeout_s=0.4)


def samples(folder: ShardFolder) -> list[Sample]:
    read = SampleReader(folder)
    return [read(number) for number in range(folder.num_samples)]


def test_samples_are_those_of_the_disk_and_are_fetched_once(
    shards: ShardFolder, server: Server, reading: Reading
) -> None:
    folder = load_manifest(server.url, reading)
    assert folder.digest == shards.digest
    assert samples(folder) == samples(shards)
    server.ranges.clear()
    assert samples(load_manifest(server.url, reading)) == samples(shards)
    assert {asked.split()[1] for asked in server.ranges} <= {"0-511"}  # what looks whether there are ranges


def keys(loader: Iterator[list[Sample]], count: int) -> list[str]:
    return [sample.key for batch in itertools.islice(loader, count) for sample in batch]


def as_is(sample: Sample) -> Sample:
    return sample


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_that_are_forked_read(shards: ShardFolder, server: Server, reading: Reading, num_workers: int) -> None:
    """This process has read from the server before it forks."""
    folder = load_manifest(server.url, reading)
    order = in_order(Share(0, 1, 2), shards, seed=3)
    server.faults += ["500", "cut", "short"]
    got = make_loader(SampleReader(folder), as_is, list, order, num_workers=num_workers)
    expected = make_loader(SampleReader(shards), as_is, list, order, num_workers=0)
    assert keys(iter(got), 10) == keys(iter(expected), 10)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("long", "noise", "refuse")])
def test_what_a_server_does_once_is_survived(
    shards: ShardFolder, server: Server, reading: Reading, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = load_manifest(server.url, reading)
    server.faults += ["ok", fault]  # the index, after the look at its size
    read = SampleReader(folder)
    server.faults += [fault]
    assert [read(number) for number in range(10)] == samples(shards)
    said = capfd.readouterr().err
    for name in ("index/samples.npy", "shard-000000.tar"):
        assert fault == "wrong" or f"WARNING: try 1 of 6 to read {server.url}/{name} failed" in said


@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        ("stall", StallError, r"no complete answer within 0\.4 s, after 6 tries"),
        ("cut", StallError, "after 6 tries"),
        ("short", StallError, r"only \d+ of \d+ bytes from byte 0 came, after 6 tries"),
        ("500", StallError, "500.*after 6 tries"),
        ("refuse", StallError, "403"),
        ("wrong", DataError, "damaged shard|json is missing"),
        ("long", DataError, "sends a whole file instead of a range"),
    ],
)
def test_what_a_server_does_for_ever_is_named(
    server: Server, reading: Reading, fault: str, error: type[DataError], reason: str
) -> None:
    folder = load_manifest(server.url, reading)
    read = SampleReader(folder)
    server.always = fault
    with pytest.raises(DataError, match=reason) as caught:
        read(0)
    assert type(caught.value) is error
    assert "shard-000000.tar" in str(caught.value)
    if error is StallError:
        assert f"(shard-000000.tar/000000000); restore {server.url}/shard-000000.tar" in str(caught.value)


def test_no_access_to_counts_is_none(server: Server, reading: Reading, capfd: pytest.CaptureFixture[str]) -> None:
    """A bucket that may not be listed answers so for a file that does not exist."""
    folder = load_manifest(server.url, reading)
    server.missing = 403
    assert load_counts("tokens-0123456789abcdef.npz", folder, stage="stage1") is None
    said = capfd.readouterr().err
    assert "NOTE: taken as no counts of tokens: " in said
    assert "try 1" not in said


def test_a_shard_that_disappears_is_named_at_once(
    shards: ShardFolder, server: Server, reading: Reading, capfd: pytest.CaptureFixture[str]
) -> None:
    read = SampleReader(load_manifest(server.url, reading))
    (shards.path / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read the shard: .*\(shard-000002.tar/000000008\)"):
        read(8)
    assert "WARNING" not in capfd.readouterr().err
    with pytest.raises(DataError, match=rf"the shard is missing \({server.url}/shard-000002.tar\)"):
        load_manifest(server.url, reading)


def test_wrong_bytes_in_an_image_are_found_when_the_shard_is_complete(
    shards: ShardFolder, server: Server, reading: Reading, capfd: pytest.CaptureFixture[str]
) -> None:
    """No good sample is skipped for it; a server that has other bytes for ever ends the run."""
    read = SampleReader(load_manifest(server.url, reading))
    server.faults += ["noise"]
    first = [read(0), read(1), read(2)]
    assert encode_read(as_is, read, 3) == samples(shards)[3]
    assert "shard-000000.tar: all of its samples were read, and it has sha256" in capfd.readouterr().err
    assert [read(number) for number in range(4)] == samples(shards)[:4]
    assert first[0] != samples(shards)[0]
    server.faults += ["noise", *["ok"] * 4, "noise"]  # the fourth sample is read twice
    changed = [partial(read, number, again=True) for number in (4, 5, 6, 7, 4, 5, 6)]
    for get in changed[:-1]:
        get()
    with pytest.raises(WrongShardError, match=r"all of its samples were read, and it has sha256 .*shard-000001.tar"):
        first_usable(lambda number: changed[-1](), range(3), "skip")


def test_a_sample_that_is_skipped_is_counted_and_a_dead_server_is_not(
    shards: ShardFolder,
    server: Server,
    reading: Reading,
    tiny_tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor,
) -> None:
    """Not every sample of the folder is skipped while a server is away."""
    folder, order = load_manifest(server.url, reading), in_order(Share(0, 1, 2), shards, seed=3)
    encoder = Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=2)
    loader = iter(make_loader(SampleReader(folder), encoder, list, order, num_workers=0, on_fault="skip"))
    server.faults += ["500"] * remote.TRIES
    assert [len(sample.faults) for sample in next(loader)] == [1, 0]
    server.always = "500"
    server.ranges.clear()
    with pytest.raises(StallError, match="500"):
        next(loader)
    assert len(server.ranges) == remote.MAX_STALLS_IN_ROW * remote.TRIES


def test_a_url_without_a_folder_of_shards_is_named(server: Server, reading: Reading) -> None:
    missing = rf"no manifest.json: the server has no such file \(404\) \({server.url}/nothing/manifest.json\)"
    with pytest.raises(DataError, match=missing):
        load_manifest(f"{server.url}/nothing", reading)
    allowed = "allowed: a folder, or a URL of s3, gs, hf, http, https, and others of fsspec; "
    with pytest.raises(DataError, match=rf"nosuch:// cannot be read \(nosuch://a\): .*{allowed}"):
        load_manifest("nosuch://a", reading)


def test_no_message_has_credentials(server: Server, reading: Reading, capfd: pytest.CaptureFixture[str]) -> None:
    url = server.url.replace("://", "://someone:pass@") + "/?token=secret"
    folder = load_manifest(url, reading)
    read = SampleReader(folder)
    server.always = "500"
    with pytest.raises(StallError) as caught:
        read(0)
    said = str(caught.value) + str(folder.place) + capfd.readouterr().err
    assert server.url in said
    assert "secret" not in said
    assert "pass" not in said
    assert folder.place.where("a") == f"{server.url}/a"


class Library:
    """A filesystem whose reads raise an error, or give something."""

    def __init__(self, outcome: object) -> None:
        self.outcome, self.calls = outcome, 0

    def cat_file(self, path: str, start: int = 0, end: int = 0) -> object:
        self.calls += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def info(self, path: str) -> object:
        return {"name": path, "size": None}


class OwnError(Exception):
    """As packages of filesystems have them."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(b"")
    monkeypatch.setattr(remote, "connect", lambda url: (library, "root"))
    monkeypatch.setattr(remote, "_filesystems", {})
    return library


@pytest.mark.parametrize(
    "error", [OSError("away"), TimeoutError("away"), OwnError("away"), ValueError("away")], ids=repr
)
def test_what_a_filesystem_raises_is_tried_again_and_named(
    library: Library, reading: Reading, error: Exception
) -> None:
    library.outcome = error
    with pytest.raises(StallError, match=rf"cannot be read: {type(error).__name__}: away, after 6 tries .nosuch://a/m"):
        load_manifest("nosuch://a", reading)
    assert library.calls == remote.TRIES


def test_missing_credentials_are_said_at_once(library: Library, reading: Reading) -> None:
    """They do not come by waiting. The class is that of S3's package, by its name."""
    library.outcome = type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
    said = r"cannot be read: NoCredentialsError: Unable to locate credentials \(nosuch://a/.*network and credentials"
    with pytest.raises(StallError, match=said):
        load_manifest("nosuch://a", reading)
    assert library.calls == 1


@pytest.mark.parametrize("kind", [TypeError, AttributeError, NameError, KeyError, AssertionError])
def test_a_fault_of_the_program_is_no_fault_of_the_server(
    library: Library, reading: Reading, kind: type[Exception]
) -> None:
    """It keeps its kind and its traceback, at once."""
    library.outcome = kind("a bug")
    with pytest.raises(kind, match="a bug"):
        load_manifest("nosuch://a", reading)
    assert library.calls == 1


def test_a_server_that_does_not_say_sizes_is_named(shards: ShardFolder, library: Library, reading: Reading) -> None:
    library.outcome = (shards.path / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"not say how large a file is \(nosuch://a/shard-000000.tar\); .*Content-Len"):
        load_manifest("nosuch://a", reading)


def test_in_memory(shards: ShardFolder, reading: Reading) -> None:
    """Any of fsspec's filesystems will do."""
    from fsspec import filesystem

    filesystem("memory").put(str(shards.path), "/some/shards", recursive=True)
    assert samples(load_manifest("memory://some/shards", reading)) == samples(shards)


def configuration(url: str, cache: Path, *overrides: str) -> Config:
    return load_config(RECIPE, [f"data.shards={url}", f"data.cache_dir={cache}", "run.dir=unused", *overrides])


def test_a_recipe_names_a_url(shards: ShardFolder, server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PLACE", "some/place")
    config = configuration("s3://$PLACE/shards/", tmp_path, f"evaluation.shards=file://{shards.path}")
    assert config.data.shards == "s3://some/place/shards/"
    assert config.evaluation.shards == shards.path
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_the_checks_before_a_run_read_it(server: Server, tmp_path: Path) -> None:
    config = configuration(server.url, tmp_path / "cache", "model.path=some/model")
    check_inputs(config)
    (row,) = check_shards(config)
    assert row.state == "ok"
    assert f"10 samples in 3 shards ({server.url})" in row.found
    with pytest.raises(DataError, match=r"no manifest.json: .*\(http.*/other/manifest.json\)"):
        check_inputs(configuration(f"{server.url}/other", tmp_path / "cache", "model.path=some/model"))


def test_a_run_outlasts_all_tries(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would end by its own limit before the server is named."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1.0)
    settings = ["model.path=some/model", "distributed.timeout_s=1000"]
    check_inputs(configuration(server.url, tmp_path / "cache", *settings, "data.read_timeout_s=39"))
    with pytest.raises(ConfigError, match=r"813 s \(data.read_timeout_s=40\.0\); allowed: less than 800 s"):
        check_inputs(configuration(server.url, tmp_path / "cache", *settings, "data.read_timeout_s=40"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs:// cannot be read \(gs://a\): .*pip install gcsfs$"):
        check_inputs(configuration("gs://a", tmp_path / "cache"))


def test_a_server_without_ranges_ends_a_check_at_its_first_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "own_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["mirage-data", "check", server.url])
    server.always = "long"
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr()
    assert (said.out + said.err).count("sends a whole file instead of a range") == 1
    assert len(server.ranges) == 1


def test_a_folder_on_a_server_is_checked(shards: ShardFolder, server: Server, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cache, "own_folder", lambda: tmp_path / "cache")
    assert list(check(server.url)) == []
    path = shards.path / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"text_input", b"text_inpux", 1))
    assert any("the shard has sha256" in fault and "shard-000001.tar" in fault for fault in check(server.url))
