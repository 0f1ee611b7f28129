"""What the log and the heartbeats of one attempt say: how it ended, which node it came from, which rank is behind."""

import json
import re
from pathlib import Path
from typing import Any

USER_ERROR = 2  # the exit code of what a user must mend: errors.py

# srun's own words: "srun: error: node2: task 1: Killed", "srun: error: node[1-2]: tasks 0-3: Exited with exit code 1"
DEATH = re.compile(r"^srun: error: (?P<node>[\w.-]+)(?P<more>\[\S+\])?: tasks? [\d,-]+: (?P<how>.+)$", re.MULTILINE)
NODE_FAILURE = re.compile(r"^srun: error: Node failure on (?P<node>[\w.-]+)", re.MULTILINE)

# The connection to a node broke, the step's second one; srun may then exit with 0 all the same.
MISSING_NODE = re.compile(r"^srun: error: Aborting, io error and missing step on node (?P<number>\d+)", re.MULTILINE)
ABORTED = re.compile(r"^srun: Job step aborted", re.MULTILINE)

# SLURM takes the nodes back; the batch script too was killed if the save took longer than SLURM waits.
TAKEN_BACK = re.compile(r"^slurmstepd\S*: error: .* CANCELLED AT \S+ DUE TO (JOB REQUEUE|PREEMPTION)", re.MULTILINE)

# A node without the shared disk has no python there; srun gives exit code 2.
NO_PYTHON = re.compile(r"^slurmstepd\S*: error: execve\(\)", re.MULTILINE)

# The node check has a limit of its own: job.sh.
STEP_LIMIT = re.compile(r"^slurmstepd\S*: error: \*\*\* STEP .* DUE TO TIME LIMIT", re.MULTILINE)

# The warning before a limit, or a preemption's, that came before the ranks listened.
UNHEARD = ("User defined signal 1", "Terminated")


def classify(code: int, terminated: bool, marked: bool, log: str) -> str:
    """How an attempt ended. `log`: what it wrote."""
    if NODE_FAILURE.search(log):
        return "failed"  # SLURM ends the batch script too, and requeues the job by itself
    if terminated:
        return "stopped"
    if code == 0:
        if marked:
            return "preempted"
        return "failed" if ABORTED.search(log) else "finished"
    # srun ends the other ranks when the first one fails, and then returns what became of them
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
    """The node that a failure came from: the one that SLURM lost, or where a rank died first.

    After a hang every rank ends by the same timeout, and who was first says nothing: then the one that is behind.
    """
    lost = lost_node(log, list(dict.fromkeys(hosts)))
    if lost:
        return lost
    if not beats or now - max(beat["time"] for beat in beats.values()) < timeout_s:
        death = DEATH.search(log)
        # several nodes in one line died at once: that is no node's fault
        return death["node"] if death and not death["more"] else None
    steps = {rank: beats[rank]["step"] if rank in beats else -1 for rank in range(len(hosts))}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    return hosts[behind[0]] if len({hosts[rank] for rank in behind}) == 1 else None


def lost_node(log: str, nodes: list[str]) -> str | None:
    """The node of which SLURM or srun says that it is gone."""
    failure, missing = NODE_FAILURE.search(log), MISSING_NODE.search(log)
    if failure:
        return failure["node"]
    return nodes[int(missing["number"])] if missing else None


def who_is_behind(beats: dict[int, dict[str, Any]], hosts: list[str], now: float) -> str:
    """One line: the rank with the oldest step, since when, on which host."""
    silent = [rank for rank in range(len(hosts)) if rank not in beats]
    if silent:
        return f"heartbeats: rank {silent[0]} on {hosts[silent[0]]} never came to its first step" + (
            f", like {len(silent) - 1} other ranks of {len(hosts)}" if len(silent) > 1 else ""
        )
    rank, beat = min(beats.items(), key=lambda item: (item[1]["step"], item[1]["time"]))
    newest = max(beat["step"] for beat in beats.values())
    ago = f"for {now - beat['time']:.0f} s"
    if beat["step"] == newest:
        return f"heartbeats: all {len(beats)} ranks are at step {newest}; the longest silent is rank {rank} on " + (
            f"{beat['host']}, {ago}"
        )
    return f"heartbeats: rank {rank} on {beat['host']} is behind, at step {beat['step']} of {newest}, silent {ago}"


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """What each rank wrote last: step, host, time. One that was just being written is left out."""
    beats = {}
    for path in (run / "heartbeat").glob("rank_*"):
        number, text = path.name.removeprefix("rank_"), path.read_text()
        if number.isdecimal() and text.endswith("}\n"):
            beats[int(number)] = json.loads(text)
    return beats


def hosts_of_ranks(nodes: list[str], ranks_per_node: int) -> list[str]:
    """Where srun puts each rank: node by node."""
    return [node for node in nodes for _ in range(ranks_per_node)]
