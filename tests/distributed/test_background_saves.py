"""Saves in the background on 2 ranks: exact although training continues, one at a time, and what a fault does.

SIGSTOP holds a writer process, so that nothing here depends on how long a write takes.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import background_worker
import damages
import launching
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.checkpoint.complete import tags, wrong_content
from mirage_ds.checkpoint.find import find_named
from mirage_ds.hf.preset import write_tiny

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run's folder, and what each rank reported."""
    folder = tmp_path_factory.mktemp("background")
    with launching.start(2, folder / "run", folder, main=background_worker.main, log=folder / "log") as ranks:
        ranks.finish(timeout_s=300)
    return folder / "run", [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_training_goes_on_while_a_checkpoint_is_written(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    """What is stored is the state of its step, by DeepSpeed's own reader too."""
    run, ranks = reports
    stored = {}
    for step in (1, 3, 4):
        checkpoint = run / "checkpoints" / f"global_step{step}"
        assert wrong_content(checkpoint) is None
        for rank, report in enumerate(ranks):
            (file,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            groups = torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
            assert damages.digest_of(groups) == report["masters"][str(step)]
        stored[step] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    assert not torch.equal(stored[1]["0.weight"], stored[3]["0.weight"])
    for rank in ranks:
        assert rank["while held"] == ["WRITING", False]
        assert rank["loaded"] == {"tag": "global_step4", "sha256": rank["masters"]["4"]}


def test_a_second_save_waits_for_the_first(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all(rank["first when the second begins"] for rank in reports[1])


def test_a_killed_writer_ends_all_ranks_with_one_message(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    run, ranks = reports
    assert [rank["after the kill"] for rank in ranks] == ["FAILED", "FAILED"]
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "the checkpoint could not be written (" in ranks[0]["error"]
    assert "rank 1: the process that writes its files" in ranks[0]["error"]
    assert "was ended by SIGKILL" in ranks[0]["error"]
    assert "resume from global_step4, which is complete" in ranks[0]["error"]
    names = {path.name for path in (run / "checkpoints").glob("global_step*")}
    assert names == {"global_step1", "global_step3", "global_step4"}


def test_without_the_memory_on_one_rank_all_save_blocking(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with launching.start(2, tmp_path / "run", main=background_worker.little_memory, log=log) as ranks:
        output = ranks.finish(timeout_s=300)
    first, second = [line for line in output.splitlines() if line.startswith("Training waits while a checkpoint is")]
    assert "as with checkpoint.mode=blocking: the ranks on " in first
    assert "GB of host memory, and 0.0 GB are free" in first
    assert "rank 1 cannot take 0.0 GB of host memory: [Errno 2] No such file" in second
    assert find_named(tmp_path / "run").name == "global_step1"


def writer_of(rank: int) -> int:
    """The pid of the writer process of the rank with this pid, once it is there."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for child in Path(f"/proc/{rank}/task/{rank}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text() == "mirage-writer\n":
                return int(child)
        time.sleep(0.01)
    raise AssertionError("no writer")


def wait_until(ranks: launching.Ranks, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 600
    while not condition():
        assert ranks.code is None, ranks.log.read_text()[-3000:]
        assert time.monotonic() < deadline_s, ranks.log.read_text()[-3000:]
        time.sleep(0.02)


def test_an_early_end_waits_for_the_writers_and_a_killed_one_ends_the_run(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 10)
    write_tiny(rows, tmp_path / "model", seed=0)
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    log, run = tmp_path / "log", tmp_path / "run"
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    arguments = [
        str(RECIPE),
        f"run.dir={run}",
        f"model.path={tmp_path / 'model'}",
        f"data.shards={tmp_path / 'shards'}",
    ]
    arguments += ["run.resume=auto", "train.max_steps=100000", "train.log_freq=1", "checkpoint.interval=20"]

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    with launching.start(2, *arguments, log=log) as ranks:
        writers = [writer_of(process.pid) for process in ranks.processes]
        for pid in writers:
            os.kill(pid, signal.SIGSTOP)
        wait_until(ranks, lambda: steps() > 22)
        ranks.send_signal(signal.SIGTERM)
        wait_until(ranks, lambda: "saving and ending after step" in log.read_text())
        assert not tags(checkpoints)
        for pid in writers:
            os.kill(pid, signal.SIGCONT)
        ranks.finish(timeout_s=300)
    last = json.loads((run / "preempted").read_text())["step"]
    assert 22 < last < 40
    assert {path.name for path in tags(checkpoints)} == {"global_step20", f"global_step{last}"}
    assert all(wrong_content(path) is None for path in tags(checkpoints))

    with launching.start(2, *arguments, log=log) as ranks:
        victim = writer_of(ranks.processes[1].pid)
        os.kill(victim, signal.SIGSTOP)
        wait_until(ranks, lambda: (checkpoints / "global_step40.part").exists())
        os.kill(victim, signal.SIGKILL)
        assert ranks.wait(timeout_s=300) == 2
    output = log.read_text()
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    assert f"(pid {victim}) was ended by SIGKILL" in output
    assert f"resume from global_step{last}, which is complete" in output
    assert find_named(run) == checkpoints / f"global_step{last}"
    assert not list(checkpoints.glob("*.part"))
