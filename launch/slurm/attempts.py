"""What the batch script asks before and after each attempt of its job: who failed, and whether it starts again.

    python -m launch.slurm.attempts begin JOB                          (JOB is RUN/jobs/N)
    python -m launch.slurm.attempts end JOB --code N [--terminated]

The answer is one line on stdout, `run`, `end` or `requeue [NODES TO EXCLUDE]`; reasons go to stderr, which is the log.

JOB/running.json    the attempt that runs: SLURM's restart count, its nodes, its start, where the log stood
JOB/attempts.jsonl  one line per attempt that is over
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.slurm.attempt_log import (
    TAKEN_BACK,
    classify,
    find_suspect,
    hosts_of_ranks,
    lost_node,
    read_heartbeats,
    who_is_behind,
)

RUNNING_NAME, ATTEMPTS_NAME, LOG_NAME, RECIPE_NAME = "running.json", "attempts.jsonl", "log", "recipe.yaml"
FAILURES_TO_EXCLUDE = 2
RESTARTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Attempt:
    """One attempt that is over."""

    job: str
    restart: int  # SLURM's count: 0 for the first attempt
    nodes: list[str]
    started: float  # unix seconds
    ended: float
    code: int | None  # srun's exit code; None: nobody was left to see it
    outcome: str  # finished, preempted, stopped (by SLURM, the user, or for other nodes), refused, failed, lost
    step: int  # the newest step that a heartbeat tells, -1: none
    checkpoint: int  # the newest complete checkpoint's step, -1: none
    suspect: str | None  # the node that the failure came from, as far as it can be told

    @property
    def is_failure(self) -> bool:
        return self.outcome in ("failed", "lost")


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next."""

    action: str  # run, end or requeue
    reason: str
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.action, ",".join(self.exclude))).strip()


def begin(job: Path, environment: dict[str, str], nodes: list[str], there: set[str]) -> Verdict:
    """Before the ranks start: books an attempt that ended with its node, forgets its traces, notes the new one.

    Args:
        nodes: those that SLURM gave this attempt.
        there: the nodes of the partition without those that the job leaves out.
    """
    run = job.parents[1]
    left = job / RUNNING_NAME
    attempts = read_attempts(job)
    if left.exists():
        lost = json.loads(left.read_text())
        log = log_since(job, lost["log_bytes"])
        gone = lost_node(log, lost["nodes"])
        if TAKEN_BACK.search(log) and not gone:
            attempts.append(_book(job, lost, None, "stopped", None))
        else:
            attempts.append(_book(job, lost, None, "lost", gone or lost["nodes"][0]))
        left.unlink()
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
    if attempts and attempts[-1].is_failure:  # SLURM itself started it again: what `end` says has not been done yet
        verdict = judge(attempts, read_recipe(job)["launch"]["max_restarts"], there)
        if verdict.action == "end":
            return verdict
        if set(verdict.exclude) & set(nodes):
            _book(job, attempt, None, "stopped", None)  # so that the next start runs, wherever it is
            return verdict
    left.write_text(json.dumps(attempt) + "\n")
    return Verdict("run", f"goes on from step {checkpoint}" if checkpoint >= 0 else "starts at step 0")


def end(job: Path, code: int, terminated: bool, restart: int, there: set[str]) -> Verdict:
    """After the ranks ended: says who was behind, books the attempt, decides.

    Args:
        code: srun's exit code.
        terminated: the batch script itself got SIGTERM.
        restart: SLURM's count for the start that ended.
        there: as in `begin`.
    """
    left = job / RUNNING_NAME
    attempt = json.loads(left.read_text()) if left.exists() else None
    if attempt is None or attempt["restart"] != restart:
        # This node was cut off and SLURM has started the job elsewhere, where this attempt has been booked.
        return Verdict("end", f"start {restart} was given up by SLURM, and another one has taken over")
    run, log = job.parents[1], log_since(job, attempt["log_bytes"])
    recipe = read_recipe(job)
    hosts = hosts_of_ranks(attempt["nodes"], attempt["ranks_per_node"])
    beats = read_heartbeats(run)
    outcome = classify(code, terminated, (run / "preempted").exists(), log)
    suspect = None
    if outcome == "failed":
        print(who_is_behind(beats, hosts, time.time()), file=sys.stderr)
        suspect = find_suspect(log, beats, hosts, time.time(), recipe["distributed"]["timeout_s"])
    _book(job, attempt, code, outcome, suspect)
    left.unlink()
    return judge(read_attempts(job), recipe["launch"]["max_restarts"], there)


def judge(attempts: list[Attempt], max_restarts: int, there: set[str]) -> Verdict:
    """What to do after the last of these attempts, in a partition with these nodes."""
    last = attempts[-1]
    reasons = {
        "finished": "the run is finished",
        "stopped": "SLURM ends this job (scancel, requeue or preemption); a requeue is SLURM's",
        "refused": "the run was refused, see the message above; starting again would not change it",
    }
    if last.outcome in reasons:
        return Verdict("end", reasons[last.outcome])
    if _restarts_without_progress(attempts) >= RESTARTS_WITHOUT_PROGRESS:
        return Verdict(
            "end",
            f"no progress in {RESTARTS_WITHOUT_PROGRESS} restarts: none came beyond step {max(last.step, 0)} or wrote "
            "a newer checkpoint; the job ends; look for the first error above, and submit again with the same command",
        )
    if last.outcome == "preempted":
        return Verdict("requeue", "preempted, or at its time limit: goes on when SLURM starts it again")
    failures = [attempt for attempt in attempts if attempt.is_failure]
    if len(failures) > max_restarts:
        return Verdict(
            "end",
            f"{len(failures)} attempts failed, and launch.max_restarts={max_restarts}; the job ends; mend the cause "
            "and submit again with the same command, or raise launch.max_restarts",
        )
    suspects = [attempt.suspect for attempt in failures if attempt.suspect]
    exclude = tuple(sorted({node for node in suspects if suspects.count(node) >= FAILURES_TO_EXCLUDE}))
    reason = f"failure {len(failures)}, restart {len(failures)} of {max_restarts}"
    if last.suspect:
        reason += f"; it came from {last.suspect}"
    if exclude and len(there - set(exclude)) < len(last.nodes):
        reason += f"; {', '.join(exclude)} failed {FAILURES_TO_EXCLUDE} times, but too few nodes would be left without"
        exclude = ()
    return Verdict("requeue", reason + (f"; without {', '.join(exclude)}" if exclude else ""), exclude)


def _restarts_without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts came no further than those before them; SLURM's own stops do not count."""
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
    """The newest step of the heartbeats and of the complete checkpoints; -1: none."""
    steps = [beat["step"] for beat in read_heartbeats(run).values()]
    names = (path.name.removeprefix("global_step") for path in (run / "checkpoints").glob("global_step*"))
    return max(steps, default=-1), max((int(name) for name in names if name.isdecimal()), default=-1)


def read_attempts(job: Path) -> list[Attempt]:
    file = job / ATTEMPTS_NAME
    lines = file.read_text().splitlines() if file.exists() else []
    return [Attempt(**json.loads(line)) for line in lines]


def read_recipe(job: Path) -> dict[str, Any]:
    """The resolved recipe: every key is there."""
    return yaml.safe_load((job / RECIPE_NAME).read_text())


def _book(job: Path, attempt: dict[str, Any], code: int | None, outcome: str, suspect: str | None) -> Attempt:
    """Adds a line to attempts.jsonl."""
    step, checkpoint = progress(job.parents[1])
    over = Attempt(
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
        file.write(json.dumps(asdict(over)) + "\n")
    return over


def _log_size(job: Path) -> int:
    log = job / LOG_NAME
    return log.stat().st_size if log.exists() else 0


def log_since(job: Path, start: int) -> str:
    """What was written into the job's log since it had `start` bytes."""
    with (job / LOG_NAME).open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def nodes_of_job(environment: dict[str, str]) -> list[str]:
    """The names of the allocation's nodes, in SLURM's order."""
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def nodes_of_partition(environment: dict[str, str]) -> set[str]:
    """All nodes that the job could run on, whatever they do now; none if SLURM does not answer: nobody is excluded."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N", f"--partition={environment['SLURM_JOB_PARTITION']}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


def excluded_nodes(environment: dict[str, str]) -> set[str]:
    """The nodes that the job leaves out already; none if SLURM does not answer."""
    command = ["scontrol", "--oneliner", "show", "job", environment["SLURM_JOB_ID"]]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r" ExcNodeList=(\S+)", shown)
    if found is None or found[1] == "(null)":
        return set()
    command = ["scontrol", "show", "hostnames", found[1]]
    return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        commands.add_parser(name).add_argument("job", type=Path)
    commands.choices["end"].add_argument("--code", type=int, required=True)
    commands.choices["end"].add_argument("--terminated", action="store_true")
    options, environment = parser.parse_args(), dict(os.environ)
    excluded = excluded_nodes(environment)
    there = nodes_of_partition(environment) - excluded
    if options.command == "begin":
        verdict = begin(options.job, environment, nodes_of_job(environment), there)
    else:
        restart = int(environment.get("SLURM_RESTART_COUNT", 0))
        verdict = end(options.job, options.code, options.terminated, restart, there)
    print(f"{time.strftime('%F %T')} {verdict.action}: {verdict.reason}", file=sys.stderr)
    if verdict.exclude:  # SLURM takes the list as a whole
        verdict = replace(verdict, exclude=tuple(sorted({*verdict.exclude, *excluded})))
    print(verdict)


if __name__ == "__main__":
    main()
