"""Ranks are killed, a node is powered off, links are cut: the job resumes from the last complete checkpoint."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from cluster import KILL_WAIT_S, SLURMD_TIMEOUT_S, wait_until
from runs import ENDLESS, TIMEOUT_S, Ground, Run

pytestmark = pytest.mark.slow

INTERVAL = 3


def kill_rank(run: Run, node: str) -> None:
    (rank,) = run.ranks(node)
    os.kill(rank, signal.SIGKILL)


def fail(run: Run, fault: Callable[[], object]) -> list[str]:
    """Fails after a checkpoint of this start. The job is requeued and its ranks end in time. Returns the nodes."""
    run.wait_for_step(run.checkpoint + 1)
    run.wait_for_step(run.checkpoint + INTERVAL + 1)
    starts, nodes = run.starts, run.cluster.expand(run.job["NodeList"])
    fault()
    fault_s = time.monotonic()
    run.wait_for_restart(starts, SLURMD_TIMEOUT_S + KILL_WAIT_S + 15)
    left_s = fault_s + TIMEOUT_S + KILL_WAIT_S + 15 - time.monotonic()
    on = [node for node in nodes if run.cluster.is_on(node)]
    wait_until(lambda: not any(run.ranks(node) for node in on), "the ranks' end", left_s, run.details)
    return nodes


def test_the_losses_are_those_of_the_run_that_never_failed(ground: Ground) -> None:
    cluster = ground.cluster
    first, second, third = cluster.nodes
    more = (*ENDLESS, f"checkpoint.interval={INTERVAL}", f"distributed.timeout_s={TIMEOUT_S}", "data.num_workers=0")
    run = ground.submit("stage1", "failed", *more, "launch.max_restarts=9")

    assert fail(run, lambda: kill_rank(run, second)) == [first, second]
    assert fail(run, lambda: kill_rank(run, second)) == [first, second]
    # The second node failed twice and is excluded from here on.
    assert fail(run, lambda: cluster.power_off(third)) == [first, third]
    cluster.power_on(third)
    assert fail(run, lambda: cluster.cut(third)) == [first, third]
    cluster.reconnect(third)
    assert fail(run, lambda: cut_while_saving(run, third)) == [first, third]
    cluster.reconnect(third)
    run.wait_for_step(run.checkpoint + INTERVAL + 1)
    cluster.run("scancel", run.number)
    run.wait_for_end("CANCELLED")

    assert run.attempts[-1]["outcome"] == "stopped"
    # SLURM itself may end a start that comes too soon after a lost node is back, which adds a failure.
    failures = [attempt for attempt in run.attempts if attempt["outcome"] in ("failed", "lost")]
    assert len(failures) >= 5, run.details()
    assert [attempt["suspect"] for attempt in failures[:3]] == [second, second, third]
    assert run.log.count("heartbeats: ") >= 2
    expected = ground.unbroken("stage1", "never-failed", *ENDLESS, until=run.step)[: run.step]
    assert [record["loss_hex"] for record in run.records] == [record["loss_hex"] for record in expected]


def cut_while_saving(run: Run, node: str) -> None:
    """The next checkpoint stays incomplete."""
    before = run.checkpoint
    assert run.hold_writers(node)
    run.wait_for_save()
    run.cluster.cut(node)
    assert run.checkpoint == before
