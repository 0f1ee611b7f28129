"""Decides for the batch script, before and after each attempt of its job: run, end or requeue.

    python -m launch.slurm.attempts begin JOB                          (JOB is RUN/jobs/N)
    python -m launch.slurm.attempts end JOB --code N [--terminated]

Prints one line to stdout: `run`, `end` or `requeue [NODES TO EXCLUDE]`. Reasons go to stderr, which is the job's log.

JOB/running.json    the current attempt: SLURM's restart count, nodes, start time, size of the log at its start
JOB/attempts.jsonl  one line per attempt that has ended
"""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.slurm.attempt_log import (
    TAKEN_BACK,
    classify,
    describe_slowest_rank,
    find_suspect,
    hosts_of_ranks,
    lost_node,
    read_heartbeats,
)
from mirage_ds.programs import ask

RUNNING_NAME, ATTEMPTS_NAME, LOG_NAME, RECIPE_NAME = "running.json", "attempts.jsonl", "log", "recipe.yaml"
RUNNING_KEYS = {"job", "restart", "nodes", "started", "log_bytes", "ranks_per_node"}
FAILURES_TO_EXCLUDE = 2
RESTARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Attempt:
    """One attempt that has ended."""

    job: str
    restart: int  # SLURM's count: 0 for the first attempt
    nodes: list[str]
    started: float  # unix seconds
    ended: float
    code: int | None  # srun's exit code; None if the batch script did not see it
    outcome: str  # finished, preempted, stopped (by SLURM, the user, or for other nodes), refused, failed, lost
    step: int  # the newest step in the heartbeats, -1: none
    checkpoint: int  # the step of the newest complete checkpoint, -1: none
    suspect: str | None  # the node that caused the failure, if it is known

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("failed", "lost")


@dataclass(frozen=True)
class Decision:
    """What the batch script does next."""

    action: str  # run, end or requeue
    reason: str
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.action, ",".join(self.exclude))).strip()


def begin(job: Path, environment: dict[str, str], nodes: list[str], available_nodes: set[str]) -> Decision:
    """Before the ranks start: records an attempt that was lost with its node, clears its traces, notes the new one.

    Args:
        nodes: those that SLURM gave this attempt.
        available_nodes: the nodes of the partition without those that the job excludes.
    """
    run = job.parents[1]
    running_file = job / RUNNING_NAME
    attempts = read_attempts(job)
    if lost := read_running(job):
        log = log_since(job, lost["log_bytes"])
        suspect = lost_node(log, lost["nodes"])
        if TAKEN_BACK.search(log) and not suspect:
            attempts.append(_record(job, lost, None, "stopped", None))
        else:
            attempts.append(_record(job, lost, None, "lost", suspect or lost["nodes"][0]))
        running_file.unlink()
    _, checkpoint = progress(run)
    for heartbeat in (run / "heartbeat").glob("rank_*"):
        heartbeat.unlink()
    (run / "preempted").unlink(missing_ok=True)
    attempt = {
        "job": environment["SLURM_JOB_ID"],
        "restart": int(environment.get("SLURM_RESTART_COUNT", 0)),
        "nodes": nodes,
        "started": time.time(),
        "log_bytes": _log_size(job),
        "ranks_per_node": int(environment["SLURM_NTASKS_PER_NODE"]),
    }
    if attempts and attempts[-1].is_failure:  # SLURM may have restarted the job by itself, before `end` could decide
        decision = decide(attempts, read_recipe(job)["launch"]["max_restarts"], available_nodes)
        if decision.action == "end":
            return decision
        if set(decision.exclude) & set(nodes):
            _record(job, attempt, None, "stopped", None)  # so that the next start runs, on any nodes
            return decision
    new = running_file.with_suffix(".new")
    new.write_text(json.dumps(attempt) + "\n")
    new.replace(running_file)
    return Decision("run", f"resumes from step {checkpoint}" if checkpoint >= 0 else "starts at step 0")


def end(job: Path, code: int, terminated: bool, restart: int, available_nodes: set[str]) -> Decision:
    """After the ranks have ended: logs the slowest rank, records the attempt, decides.

    Args:
        code: srun's exit code.
        terminated: the batch script itself got SIGTERM.
        restart: SLURM's restart count of the attempt that ended.
        available_nodes: as in `begin`.
    """
    running_file = job / RUNNING_NAME
    attempt = read_running(job)
    if attempt is None or attempt["restart"] != restart:
        # SLURM lost this node and has restarted the job on others, where this attempt has been recorded.
        return Decision("end", f"SLURM has replaced start {restart} by another one")
    run, log = job.parents[1], log_since(job, attempt["log_bytes"])
    recipe = read_recipe(job)
    hosts = hosts_of_ranks(attempt["nodes"], attempt["ranks_per_node"])
    beats = read_heartbeats(run)
    outcome = classify(code, terminated, (run / "preempted").exists(), log)
    suspect = None
    if outcome == "failed":
        print(describe_slowest_rank(beats, hosts, time.time()), file=sys.stderr)
        suspect = find_suspect(log, beats, hosts, time.time(), recipe["distributed"]["timeout_s"])
    _record(job, attempt, code, outcome, suspect)
    running_file.unlink()
    return decide(read_attempts(job), recipe["launch"]["max_restarts"], available_nodes)


def decide(attempts: list[Attempt], max_restarts: int, available_nodes: set[str]) -> Decision:
    """What to do after the last of these attempts."""
    last = attempts[-1]
    reasons = {
        "finished": "the run is finished",
        "stopped": "SLURM stopped this job (scancel, requeue or preemption); only SLURM may requeue it",
        "refused": "the run was refused, see the message above; a restart would not change it",
    }
    if last.outcome in reasons:
        return Decision("end", reasons[last.outcome])
    if _restarts_without_progress(attempts) >= RESTARTS_WITHOUT_PROGRESS:
        return Decision(
            "end",
            f"no progress in {RESTARTS_WITHOUT_PROGRESS} restarts: none went past step {max(last.step, 0)} or wrote a "
            "newer checkpoint; the job ends; fix the first error above, and submit again with the same command",
        )
    if last.outcome == "preempted":
        return Decision("requeue", "preempted, or at its time limit: resumes when SLURM restarts it")
    failures = [attempt for attempt in attempts if attempt.is_failure]
    if len(failures) > max_restarts:
        return Decision(
            "end",
            f"too many failures: {len(failures)} (launch.max_restarts={max_restarts}); the job ends; fix the cause and "
            "submit again with the same command, or raise launch.max_restarts",
        )
    suspects = [attempt.suspect for attempt in failures if attempt.suspect]
    exclude = tuple(sorted({node for node in suspects if suspects.count(node) >= FAILURES_TO_EXCLUDE}))
    reason = f"failure {len(failures)}, restart {len(failures)} of {max_restarts}"
    if last.suspect:
        reason += f"; the suspected node is {last.suspect}"
    if exclude and len(available_nodes - set(exclude)) < len(last.nodes):
        reason += f"; {', '.join(exclude)} failed {FAILURES_TO_EXCLUDE} times, but too few other nodes are left"
        exclude = ()
    return Decision("requeue", reason + (f"; excluding {', '.join(exclude)}" if exclude else ""), exclude)


def _restarts_without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts made no progress over those before them; those that SLURM stopped do not count."""
    count = 0
    step, checkpoint = attempts[0].step, attempts[0].checkpoint
    for attempt in attempts[1:]:
        if attempt.step > step or attempt.checkpoint > checkpoint:
            count = 0
        elif attempt.outcome != "stopped":
            count += 1
        step, checkpoint = max(step, attempt.step), max(checkpoint, attempt.checkpoint)
    return count


def progress(run: Path) -> tuple[int, int]:
    """The newest step of the heartbeats, and that of the complete checkpoints; -1: none."""
    steps = [beat["step"] for beat in read_heartbeats(run).values()]
    names = (path.name.removeprefix("global_step") for path in (run / "checkpoints").glob("global_step*"))
    return max(steps, default=-1), max((int(name) for name in names if name.isdecimal()), default=-1)


def read_attempts(job: Path) -> list[Attempt]:
    """The attempts that have ended; a line that a lost node or a full disk has spoiled is dropped."""
    file, attempts = job / ATTEMPTS_NAME, []
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], start=1):
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError) as error:
            print(f"WARNING: {file}, line {number} is no attempt and is dropped: {error}", file=sys.stderr)
    return attempts


def read_running(job: Path) -> dict[str, Any] | None:
    """The attempt that runs, or was lost; None if there is none, or a lost node has spoiled its file."""
    file = job / RUNNING_NAME
    try:
        running: dict[str, Any] = json.loads(file.read_text())
        if set(running) != RUNNING_KEYS:
            raise ValueError(f"it does not have the keys {', '.join(sorted(RUNNING_KEYS))}")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"WARNING: {file} cannot be read, so one attempt is not recorded: {error}", file=sys.stderr)
        return None
    return running


def read_recipe(job: Path) -> dict[str, Any]:
    """The resolved recipe, with every key set."""
    return yaml.safe_load((job / RECIPE_NAME).read_text())


def _record(job: Path, attempt: dict[str, Any], code: int | None, outcome: str, suspect: str | None) -> Attempt:
    """Adds an attempt to attempts.jsonl; returns it."""
    step, checkpoint = progress(job.parents[1])
    ended = Attempt(
        job=attempt["job"],
        restart=attempt["restart"],
        nodes=attempt["nodes"],
        started=attempt["started"],
        ended=time.time(),
        code=code,
        outcome=outcome,
        step=step,
        checkpoint=checkpoint,
        suspect=suspect,
    )
    with (job / ATTEMPTS_NAME).open("a") as file:
        file.write(json.dumps(asdict(ended)) + "\n")
    return ended


def _log_size(job: Path) -> int:
    log = job / LOG_NAME
    return log.stat().st_size if log.exists() else 0


def log_since(job: Path, start: int) -> str:
    """The job's log from byte `start` on."""
    with (job / LOG_NAME).open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def nodes_of_job(environment: dict[str, str]) -> list[str]:
    """The names of the allocation's nodes, in SLURM's order."""
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    return ask(*command).stdout.split()


def nodes_of_partition(environment: dict[str, str]) -> set[str]:
    """All nodes of the job's partition, in any state; none if SLURM does not answer, and then no node is excluded."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N", f"--partition={environment['SLURM_JOB_PARTITION']}"]
    return set(ask(*command, check=False).stdout.split())


def excluded_nodes(environment: dict[str, str]) -> set[str]:
    """The nodes that the job already excludes; none if SLURM does not answer."""
    command = ["scontrol", "--oneliner", "show", "job", environment["SLURM_JOB_ID"]]
    shown = ask(*command, check=False).stdout
    found = re.search(r" ExcNodeList=(\S+)", shown)
    if found is None or found[1] == "(null)":
        return set()
    command = ["scontrol", "show", "hostnames", found[1]]
    return set(ask(*command, check=False).stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        commands.add_parser(name).add_argument("job", type=Path)
    commands.choices["end"].add_argument("--code", type=int, required=True)
    commands.choices["end"].add_argument("--terminated", action="store_true")
    options, environment = parser.parse_args(), dict(os.environ)
    excluded = excluded_nodes(environment)
    available_nodes = nodes_of_partition(environment) - excluded
    if options.command == "begin":
        decision = begin(options.job, environment, nodes_of_job(environment), available_nodes)
    else:
        restart = int(environment.get("SLURM_RESTART_COUNT", 0))
        decision = end(options.job, options.code, options.terminated, restart, available_nodes)
    print(f"{time.strftime('%F %T')} {decision.action}: {decision.reason}", file=sys.stderr)
    if decision.exclude:  # SLURM replaces the complete list
        decision = replace(decision, exclude=tuple(sorted({*decision.exclude, *excluded})))
    print(decision)


if __name__ == "__main__":
    main()
