"""One cluster of three nodes for all tests, and the data that their runs read."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing
from generated_rows import write_rows
from runs import Ground

from data_tools.build import build
from mirage_ds.hf.preset import write_tiny


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why:
        pytest.skip(why)
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ground(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A model and shards."""
    folder = tmp_path_factory.mktemp("cluster")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return Ground(folder, cluster)
