"""One cluster of three nodes for all tests, and the data that their runs read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from generated_rows import write_rows
from runs import Ground

from data_tools.build import build
from mirage_ds.preset import write_tiny


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A model, shards and a cluster whose nodes have one rank each."""
    why = missing()
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("cluster")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    with Cluster(3) as cluster:
        (folder / "cluster.yaml").write_text("ranks_per_node: 1\ncpus_per_rank: 1\n")
        yield Ground(folder, cluster)


@pytest.fixture
def folder(ground: Ground) -> Path:
    return ground.folder
