"""The rank of a process: from the variables of DeepSpeed's launcher, torchrun or srun, or without a launcher."""

from pathlib import Path

import pytest

from mirage_ds.launcher import map_launcher_variables

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """Sets variables, maps them, and returns what the process group reads."""

    def mapped(**given: str) -> dict[str, str]:
        environment = dict(given)
        monkeypatch.setattr("os.environ", environment)
        map_launcher_variables()
        return {name: environment[name] for name in NAMES}

    return mapped


def test_ranks_that_a_launcher_sets_are_used(variables) -> None:
    given = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="node1", MASTER_PORT="29500")
    assert variables(**given, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0") == given


def test_a_task_of_srun_is_a_rank(variables, tmp_path: Path) -> None:
    step = dict(SLURM_STEP_NUM_TASKS="16", SLURM_PROCID="9", SLURM_LOCALID="1", SLURM_JOB_ID="123456")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames node[3-4]' ] && echo node3 && echo node4\n")
    scontrol.chmod(0o755)
    step |= {"SLURM_STEP_NODELIST": "node[3-4]", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert variables(**step) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "23456",
    }
    own = variables(**step, MASTER_ADDR="node7", MASTER_PORT="4000")
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("node7", "4000")


def test_without_a_launcher_there_is_one_rank(variables) -> None:
    """Also in a batch script or an allocation, outside of srun."""
    for given in ({}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}):
        alone = variables(**given)
        assert (alone["RANK"], alone["WORLD_SIZE"], alone["LOCAL_RANK"]) == ("0", "1", "0")
        assert alone["MASTER_ADDR"] == "127.0.0.1"
        assert int(alone["MASTER_PORT"]) > 0
