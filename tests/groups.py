"""Which tests stay together in one of pytest-xdist's workers: see conftest.py."""

from xdist.scheduler import LoadScopeScheduling


def group(nodeid: str) -> str:
    """The tests of a file, with two exceptions: there is one SLURM, and documents have nothing in common."""
    path = nodeid.partition("::")[0]
    if path.startswith("tests/cluster/"):
        return "tests/cluster/"
    return nodeid if path == "tests/docs/test_blocks.py" else path


class Groups(LoadScopeScheduling):
    """Tests of one group run in one worker, in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
