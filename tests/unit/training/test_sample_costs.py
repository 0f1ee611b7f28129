"""Ranks whose samples cost differently are refused, on every one of them."""

import socket
from pathlib import Path

import numpy as np
import pytest

from mirage_ds.data.costs import TOKEN_PATCHES, Costs
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.shards import Manifest, ShardFolder
from mirage_ds.errors import DataError
from mirage_ds.training.sample_costs import require_same
from mirage_ds.zero3 import distributed

Rank = tuple[str, Costs, str, ShardFolders]


def on_host(
    name: str, *, last: int = 9, patches: int = 0, source: str = "tokens counted (F)", digest: str = "d"
) -> Rank:
    tokens = np.array([5, 7, last])
    folder = ShardFolder(Path("shards"), Manifest(1, 3, "", ()), digest)
    return name, Costs(tokens, TOKEN_PATCHES * tokens + patches), source, ShardFolders((folder,), (1.0,))


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
        on_host("node-b", patches=1),
        on_host("node-b", digest="e"),
        on_host("node-b", last=8, source="tokens estimated from characters (no F)"),
    ],
    ids=["tokens", "patches", "shards", "not counted"],
)
def test_a_rank_with_other_costs_is_refused(monkeypatch: pytest.MonkeyPatch, other: Rank) -> None:
    found = refusals(monkeypatch, [on_host("node-a"), on_host("node-c"), other])
    assert len(found) == 3
    assert len(set(found)) == 1
    assert "(data.shards=shards): node-a, node-c: tokens counted (F), digest " in found[0]
    assert f"; node-b: {other[2]}, digest " in found[0]
    assert "expected the same shards, and the same file of `mirage-data count` or none, on every host; copy" in found[0]
