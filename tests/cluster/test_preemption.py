"""Interrupted in every way that SLURM has, and restarted on other numbers of nodes: still the same run."""

import os
import signal
from collections.abc import Callable

import pytest
from cluster import wait_until
from runs import ENDLESS, START_S, Ground, Run

pytestmark = pytest.mark.slow

KEPT = ("checkpoint.keep_latest_k=20", "data.num_workers=1")
LEG = 6


@pytest.fixture(scope="module")
def run(ground: Ground) -> Run:
    """Interrupted four times and requeued each time, then cancelled."""
    slurm = ground.cluster.run
    # SLURM counts time limits in minutes: the first start reaches its limit, the others do not. The signal may come a
    # minute early: here 20 to 50 s after the start, when the ranks can handle it.
    more = (*ENDLESS, *KEPT, "run.save_before_end_s=10")
    run = ground.submit("stage1", "interrupted", *more, options=("--time", "1"))
    requeued(run, lambda: None)
    slurm("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    interruptions = [
        lambda: slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"),
        lambda: slurm("scancel", "--batch", "--signal=USR1", run.number),
        lambda: slurm("scontrol", "requeue", run.number),
    ]
    for interrupt in interruptions:
        run.wait_for_step(run.checkpoint + 2)
        requeued(run, interrupt)
    run.wait_for_step(run.checkpoint + 2)
    cancel(run)
    return run


def requeued(run: Run, interrupt: Callable[[], object]) -> None:
    """The ranks save one checkpoint, of the last step, and SLURM requeues the job."""
    starts, checkpoints, ended = run.starts, run.checkpoints, len(run.attempts)
    interrupt()
    run.wait_for_restart(starts)
    wait_until(lambda: len(run.attempts) > ended, "saved", START_S, run.details)
    assert run.checkpoints == [*checkpoints, run.step], run.details()


def cancel(run: Run) -> None:
    run.cluster.run("scancel", run.number)
    run.wait_for_end("CANCELLED")
    assert run.checkpoint == run.step, run.details()


def test_the_job_records_how_each_start_ended(run: Run) -> None:
    outcomes = [attempt["outcome"] for attempt in run.attempts]
    assert outcomes == ["preempted", "preempted", "preempted", "stopped", "stopped"]
    assert run.starts == 4


def test_the_losses_are_those_of_the_run_that_was_never_stopped(ground: Ground, run: Run) -> None:
    """Bit for bit while it was interrupted; then on 1 rank of 1 node, 4 ranks of 2 nodes, and back: to 1e-4."""
    same = last = run.step
    for nodes, ranks in ((1, 1), (2, 2), (2, 1)):
        again = ground.submit("stage1", "interrupted", *ENDLESS, *KEPT, nodes=nodes, ranks=ranks)
        again.wait_for_step(last + LEG)
        cancel(again)
        last = again.step
    expected = ground.unbroken("stage1", "uninterrupted", *ENDLESS, until=last)[:last]
    got = run.records
    assert [record["step"] for record in got] == list(range(1, last + 1))
    assert [record["position"] for record in got] == [record["position"] for record in expected]
    assert [record["loss_hex"] for record in got[:same]] == [record["loss_hex"] for record in expected[:same]]
    assert [record["loss"] for record in got] == pytest.approx([record["loss"] for record in expected], rel=1e-4)


def test_a_save_under_way_is_completed(ground: Ground) -> None:
    """Preempted while checkpoints are written in the background: that one and the last one are complete, and the next
    start resumes from the last one."""
    more = (*ENDLESS, *KEPT[:1], "data.num_workers=0", "checkpoint.interval=6")
    run = ground.submit("stage1", "saving", *more)
    run.wait_for_step(2)
    held = [number for node in run.cluster.expand(run.job["NodeList"]) for number in run.hold_writers(node)]
    assert len(held) == 2
    run.wait_for_save()
    run.wait_for_step(8)
    assert run.checkpoints == []
    starts = run.starts
    run.cluster.run("scontrol", "requeue", run.number)
    for number in held:
        os.kill(number, signal.SIGCONT)
    run.wait_for_restart(starts)
    wait_until(lambda: len(run.attempts) > 0, "saved", START_S, run.details)
    assert run.checkpoints == [6, run.step], run.details()
    last = run.step
    run.wait_for_step(last + 1)
    cancel(run)
    assert f"Resuming from {run.dir / 'checkpoints' / f'global_step{last}'}" in run.log
    expected = ground.unbroken("stage1", "not-saving", *more, until=last + 1)[: last + 1]
    assert [record["loss_hex"] for record in run.records[: last + 1]] == [record["loss_hex"] for record in expected]
