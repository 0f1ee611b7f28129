"""Ranks whose samples cost differently are refused, on every one of them."""

import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.costs import SampleCosts, SetCosts
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.places import LocalPlace
from mirage_ds.data.shards import IndexFile, Manifest, ShardFolder
from mirage_ds.errors import DataError
from mirage_ds.recipe import load_config
from mirage_ds.training import start
from mirage_ds.training.sample_costs import require_same
from mirage_ds.zero3 import distributed

Rank = tuple[str, SetCosts, str, ShardFolders, dict[str, int]]


def on_host(
    name: str,
    *,
    last: int = 9,
    image: int = 12,
    source: str = "tokens counted (F)",
    digest: str = "d",
    index: str = "i",
    latent_size: int = 4,
) -> Rank:
    """A rank with three samples, the last of which has `last` counted tokens, and whose images have `image` tokens."""
    entry = IndexEntry("key", 0, 0, 0, [(9, 9)], [], 1, 1, 1, 1)
    counts = np.array([5, 7, last], np.int32)
    costs = SampleCosts(Index.of(3 * [entry]), lambda sizes: np.full(len(sizes), image), "stage1", 4, texts=counts)
    manifest = Manifest(2, 3, (IndexFile("index/keys.npy", 0, index),), ())
    folder = ShardFolder(LocalPlace(Path("shards")), manifest, digest)
    return name, SetCosts((costs,)), source, ShardFolders((folder,), (1.0,)), {"latent_size": latent_size}


def refusals(monkeypatch: pytest.MonkeyPatch, ranks: list[Rank]) -> list[str]:
    """What `require_same` says on each of these ranks; the first pass is for what each sends."""
    sent: list[object] = []

    def send(value: object) -> list[object]:
        sent.append(value)
        return [value]

    found = []
    for gather in (send, lambda value: sent):
        monkeypatch.setattr(distributed, "gather", gather)
        for host, *arguments in ranks:
            monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
            try:
                require_same(*arguments)
            except DataError as error:
                found.append(str(error))
    return found


def test_ranks_with_the_same_costs_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusals(monkeypatch, [on_host("node-a"), on_host("node-b")]) == []


@pytest.mark.parametrize(
    "other",
    [
        on_host("node-b", last=8),
        on_host("node-b", image=13),
        on_host("node-b", digest="e"),
        on_host("node-b", index="j"),
        on_host("node-b", latent_size=5),
        on_host("node-b", last=8, source="tokens estimated from characters (no F)"),
    ],
    ids=["tokens", "patches", "shards", "index", "settings", "not counted"],
)
def test_a_rank_with_other_costs_is_refused(monkeypatch: pytest.MonkeyPatch, other: Rank) -> None:
    found = refusals(monkeypatch, [on_host("node-a"), on_host("node-c"), other])
    assert len(found) == 3
    assert len(set(found)) == 1
    assert "(data.shards=shards): node-a, node-c: tokens counted (F), digest " in found[0]
    assert f"; node-b: {other[2]}, digest " in found[0]
    assert "expected the same shards, and the same file of `mirage-data count` or none, on every host; copy" in found[0]


def test_the_first_rank_of_each_node_compares_the_digests_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong byte in a column deals other samples without any message: no rank may get beyond the start with it."""
    build(write_rows(tmp_path / "rows"), tmp_path / "shards", maxcount=4, maxsize=10**9)
    column = tmp_path / "shards" / "index" / "images.npy"
    column.write_bytes(column.read_bytes()[:-1] + b"\x01")
    config = load_config(Path("launch/recipes/tiny-stage1.yaml"), [f"data.shards={tmp_path / 'shards'}"])
    encoder = SimpleNamespace(stage="text", max_length=None, may_hide_images=False)  # nothing more is checked
    monkeypatch.setattr(start, "make_encoder", lambda *_: encoder)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start.open_encoder(config) is encoder
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=rf"does not match the manifest .{column}"):
        start.open_encoder(config)
