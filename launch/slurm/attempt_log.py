"""Reads the log and the heartbeats of one attempt: how it ended, which node caused it, which rank is behind."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

USER_ERROR = 2  # exit code of an error that the user must fix: mirage_ds/errors.py

# Messages of srun: "srun: error: node2: task 1: Killed", "srun: error: node[1-2]: tasks 0-3: Exited with exit code 1"
DEATH = re.compile(r"^srun: error: (?P<node>[\w.-]+)(?P<more>\[\S+\])?: tasks? [\d,-]+: (?P<how>.+)$", re.MULTILINE)
NODE_FAILURE = re.compile(r"^srun: error: Node failure on (?P<node>[\w.-]+)", re.MULTILINE)

# The connection to a node broke; its number is its index in the step. srun may still exit with 0.
MISSING_NODE = re.compile(r"^srun: error: Aborting, io error and missing step on node (?P<number>\d+)", re.MULTILINE)
ABORTED = re.compile(r"^srun: Job step aborted", re.MULTILINE)

# SLURM requeues or preempts the job. It also kills the batch script if the save takes longer than SLURM waits.
TAKEN_BACK = re.compile(r"^slurmstepd\S*: error: .* CANCELLED AT \S+ DUE TO (JOB REQUEUE|PREEMPTION)", re.MULTILINE)

# A node without the shared disk does not find python; srun then exits with 2.
NO_PYTHON = re.compile(r"^slurmstepd\S*: error: execve\(\)", re.MULTILINE)

# The node check has its own time limit: job.sh.
STEP_LIMIT = re.compile(r"^slurmstepd\S*: error: \*\*\* STEP .* DUE TO TIME LIMIT", re.MULTILINE)

# The signal of a time limit or a preemption, if it comes before the ranks handle it.
UNHEARD = ("User defined signal 1", "Terminated")


def classify(code: int, terminated: bool, marked: bool, log: str) -> str:
    """How an attempt ended: the `outcome` of an Attempt.

    Args:
        code: srun's exit code.
        terminated: the batch script itself got SIGTERM.
        marked: the run has written RUN/preempted.
        log: the part of the job's log that the attempt wrote.
    """
    if NODE_FAILURE.search(log):
        return "failed"  # SLURM also ends the batch script, and requeues the job by itself
    if terminated:
        return "stopped"
    if code == 0:
        if marked:
            return "preempted"
        return "failed" if ABORTED.search(log) else "finished"
    # srun ends the other ranks when the first one fails, and may return their exit code instead of the first one's
    first = DEATH.search(log)
    if NO_PYTHON.search(log) or STEP_LIMIT.search(log) or MISSING_NODE.search(log):
        return "failed"
    if first and first["how"] in UNHEARD:
        return "preempted"
    if code == USER_ERROR or (first and first["how"] == f"Exited with exit code {USER_ERROR}"):
        return "refused"
    return "failed"


def find_suspect(
    log: str, beats: dict[int, dict[str, Any]], hosts: list[str], now: float, timeout_s: int
) -> str | None:
    """The node that caused a failure: the one that SLURM lost, or the one where a rank died first.

    After a hang all ranks end by the same timeout in any order; then it is the node whose ranks are behind.
    """
    lost = lost_node(log, list(dict.fromkeys(hosts)))
    if lost:
        return lost
    if not beats or now - max(beat["time"] for beat in beats.values()) < timeout_s:
        death = DEATH.search(log)
        # several nodes in one line failed at once: no single node is the cause
        return death["node"] if death and not death["more"] else None
    steps = {rank: beats[rank]["step"] if rank in beats else -1 for rank in range(len(hosts))}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    return hosts[behind[0]] if len({hosts[rank] for rank in behind}) == 1 else None


def lost_node(log: str, nodes: list[str]) -> str | None:
    """The node that SLURM or srun reports as lost."""
    failure, missing = NODE_FAILURE.search(log), MISSING_NODE.search(log)
    if failure:
        return failure["node"]
    return nodes[int(missing["number"])] if missing else None


def describe_slowest_rank(beats: dict[int, dict[str, Any]], hosts: list[str], now: float) -> str:
    """One line: the rank with the oldest step, its host, and the age of its heartbeat.

    A rank that was killed may have been some seconds further: it can no longer write. After a hang the steps are exact.
    """
    missing = [rank for rank in range(len(hosts)) if rank not in beats]
    if missing:
        return (
            f"heartbeats: rank {missing[0]} on {hosts[missing[0]]} never reached its first step; ranks without a step: "
            f"{len(missing)} of {len(hosts)}"
        )
    rank, beat = min(beats.items(), key=lambda item: (item[1]["step"], item[1]["time"]))
    newest = max(beat["step"] for beat in beats.values())
    place, age = f"rank {rank} on {beat['host']}", f"{now - beat['time']:.0f} s ago"
    if beat["step"] == newest:
        return f"heartbeats: every rank is at step {newest}; the oldest heartbeat is that of {place}, {age}"
    where = f"at step {beat['step']} of {newest}"
    return f"heartbeats: {place} is behind, {where}; its last heartbeat was {age} (they are written every 10 s)"


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """The last heartbeat of each rank: step, host, time. Files that are incomplete or spoiled are skipped."""
    beats = {}
    for path in (run / "heartbeat").glob("rank_*"):
        number, text = path.name.removeprefix("rank_"), path.read_text(errors="replace")
        with suppress(ValueError):
            beat = json.loads(text)
            if number.isdecimal() and isinstance(beat, dict) and {"step", "host", "time"} <= set(beat):
                beats[int(number)] = beat
    return beats


def hosts_of_ranks(nodes: list[str], ranks_per_node: int) -> list[str]:
    """The host of each rank: srun assigns them node by node."""
    return [node for node in nodes for _ in range(ranks_per_node)]
