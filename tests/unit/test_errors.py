"""Who speaks when a run is left: one rank of a node, or every rank that alone may know."""

import subprocess
import sys

import launching
import pytest

from mirage_ds.errors import LOCAL_RANK_NAMES


@pytest.mark.parametrize(
    ("rank", "every_rank", "speaks"),
    [
        ({}, False, True),
        ({"LOCAL_RANK": "0", "RANK": "8"}, False, True),
        ({"LOCAL_RANK": "1", "RANK": "1"}, False, False),
        ({"LOCAL_RANK": "1", "RANK": "1"}, True, True),
        ({"SLURM_LOCALID": "1"}, False, False),
        ({"MIRAGE_LOCAL_RANK": "1", "LOCAL_RANK": "0"}, False, False),  # each rank sees one GPU, number 0
    ],
)
def test_leave(rank: dict[str, str], every_rank: bool, speaks: bool) -> None:
    code = f"from mirage_ds.errors import *; leave(DataError('the row is bad'), every_rank={every_rank})"
    result = subprocess.run([sys.executable, "-c", code], env=environment() | rank, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == ("error: the row is bad\n" if speaks else "")


def environment() -> dict[str, str]:
    """Without what a launcher may have set for these tests."""
    whole = launching.environment()
    return {name: value for name, value in whole.items() if name not in (*LOCAL_RANK_NAMES, "RANK")}
