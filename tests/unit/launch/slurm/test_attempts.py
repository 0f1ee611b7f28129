"""Decisions between two starts of a job, from the files and the log lines of real attempts."""

import json
from pathlib import Path

import pytest

from launch.slurm import attempts
from launch.slurm.attempt_log import classify, describe_slowest_rank, find_suspect
from launch.slurm.attempts import Attempt, begin, decide, end, read_attempts

# Printed by srun 22.05 when rank 2 of 4 was killed with kill -9.
KILLED = """srun: error: node2: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=2.0
slurmstepd-node1: error: *** STEP 2.0 ON node1 CANCELLED AT 2026-11-23T02:30:07 ***
srun: error: node2: task 3: Terminated
srun: error: node1: tasks 0-1: Terminated
srun: Force Terminated StepId=2.0
"""
# Rank 0 on node1 exited with a user error; srun itself then returned 143.
REFUSED = """srun: error: node1: task 0: Exited with exit code 2
srun: launch/slurm: _step_signal: Terminating StepId=2.1
srun: error: node2: tasks 2-3: Terminated
"""
# node2 was powered off; srun returned 0 (22.05).
CUT = """srun: error: _server_read: fd 12 error reading header: Connection reset by peer
srun: error: Aborting, io error and missing step on node 1
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: Timed out waiting for job step to complete
"""
# SLURM requeued the job while the ranks saved; KillWait ended before the save did.
REQUEUED = "slurmstepd-node1: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-24T12:03:59 DUE TO JOB REQUEUE ***\n"
# USR1 during the node check; and a node without the shared disk.
UNHEARD = "srun: error: node1: task 0: User defined signal 1\n"
NO_PYTHON = """slurmstepd-node2: error: execve(): /shared/venv/bin/python: No such file or directory
srun: error: node2: task 1: Exited with exit code 2
"""
# The shared disk of a node hung, and the node check reached its time limit.
HUNG = """slurmstepd-node2: error: *** STEP 7.0 ON node2 CANCELLED AT 2026-11-24T12:03:59 DUE TO TIME LIMIT ***
srun: error: node2: task 1: Terminated
"""
# A collective of NCCL timed out, which ends ranks by SIGABRT. Not taken from a run: torch's and srun's words.
ABORTED = """[rank0]:[E ProcessGroupNCCL.cpp] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)
Fatal Python error: Aborted
srun: error: node1: task 0: Aborted (core dumped)
srun: error: node2: task 2: Aborted (core dumped)
"""
# SLURM lost node2 and kept the job with node1 alone; the step did not fit into it.
BUSY = "srun: error: Unable to create step for job 7: Requested nodes are busy\n"
LOST = "srun: error: Node failure on node2\n"
HOSTS = ["node1", "node1", "node2", "node2"]
AVAILABLE_NODES = {"node1", "node2", "node3"}


def attempt(outcome: str, *, step: int, checkpoint: int = -1, suspect: str | None = None) -> Attempt:
    return Attempt("7", 0, ["node1", "node2"], 0.0, 1.0, 1, outcome, step, checkpoint, suspect)


def beats(*steps: int, times: tuple[float, ...] = (100.0,) * 4) -> dict[int, dict]:
    return {rank: {"step": step, "host": HOSTS[rank], "time": times[rank]} for rank, step in enumerate(steps)}


@pytest.mark.parametrize(
    ("code", "terminated", "marked", "log", "outcome"),
    [
        (0, False, False, "", "finished"),
        (0, False, True, "", "preempted"),
        (0, True, True, "", "stopped"),  # scancel: saved and marked; must stay cancelled
        (143, True, False, KILLED, "stopped"),
        (137, False, False, KILLED, "failed"),
        (2, False, False, "", "refused"),
        (143, False, False, REFUSED, "refused"),
        (143, True, False, LOST, "failed"),
        (0, False, False, CUT, "failed"),
        (138, False, False, UNHEARD, "preempted"),
        (143, False, False, "srun: error: node1: task 0: Terminated\n", "preempted"),
        (2, False, False, NO_PYTHON, "failed"),
        (143, False, False, HUNG, "failed"),
        (1, False, False, BUSY, "failed"),
        (134, False, False, ABORTED, "failed"),
    ],
)
def test_how_an_attempt_ended(code: int, terminated: bool, marked: bool, log: str, outcome: str) -> None:
    assert classify(code, terminated, marked, log) == outcome


def test_the_suspect_is_the_node_where_a_rank_died_first() -> None:
    assert find_suspect(KILLED, beats(5, 5, 5, 5), HOSTS, 101.0, timeout_s=60) == "node2"
    assert find_suspect(LOST, beats(5, 5, 5, 5), HOSTS, 500.0, timeout_s=60) == "node2"
    assert find_suspect(CUT, beats(5, 5, 5, 5), HOSTS, 500.0, timeout_s=60) == "node2"
    everywhere = "srun: error: node[1-2]: tasks 0-3: Exited with exit code 1\n"
    assert find_suspect(everywhere, {}, HOSTS, 101.0, timeout_s=60) is None


def test_after_a_hang_the_suspect_is_the_node_that_is_behind() -> None:
    """Every rank ended by the timeout; that node1 was the first does not matter."""
    log = "srun: error: node1: task 0: Exited with exit code 1\n"
    assert find_suspect(log, beats(5, 5, 5, 4), HOSTS, 161.0, timeout_s=60) == "node2"
    assert find_suspect(log, beats(5, 5, 5, 5), HOSTS, 161.0, timeout_s=60) is None


def test_one_line_describes_the_slowest_rank() -> None:
    late = describe_slowest_rank(beats(5, 5, 4, 5, times=(100, 100, 60, 100)), HOSTS, 110.0)
    assert "rank 2 on node2 is behind, at step 4 of 5; its last heartbeat was 50 s ago" in late
    same = describe_slowest_rank(beats(5, 5, 5, 5, times=(100, 70, 100, 100)), HOSTS, 110.0)
    assert "every rank is at step 5; the oldest heartbeat is that of rank 1 on node1, 40 s ago" in same
    missing = describe_slowest_rank(beats(5, 5, 5), HOSTS, 110.0)
    assert "rank 3 on node2 never reached its first step; ranks without a step: 1 of 4" in missing


def test_what_restarts_and_what_does_not() -> None:
    assert decide([attempt("preempted", step=4)], 0, AVAILABLE_NODES).action == "requeue"
    assert decide([attempt("failed", step=4)], 1, AVAILABLE_NODES).action == "requeue"
    for outcome in ("finished", "stopped", "refused"):
        assert decide([attempt(outcome, step=4)], 9, AVAILABLE_NODES).action == "end"


def test_failures_are_counted_and_preemptions_are_not() -> None:
    past = [attempt("failed", step=1), attempt("preempted", step=2), attempt("failed", step=3)]
    assert decide(past, 2, AVAILABLE_NODES).action == "requeue"
    decision = decide([*past, attempt("lost", step=4)], 2, AVAILABLE_NODES)
    assert decision.action == "end"
    assert "launch.max_restarts=2" in decision.reason


def test_a_node_that_failed_twice_is_excluded() -> None:
    past = [attempt("failed", step=1, suspect="node2"), attempt("failed", step=2, suspect="node1")]
    assert str(decide(past, 9, AVAILABLE_NODES)) == "requeue"
    assert str(decide([*past, attempt("lost", step=3, suspect="node2")], 9, AVAILABLE_NODES)) == "requeue node2"


def test_a_node_is_kept_if_the_others_are_too_few() -> None:
    twice = [attempt("failed", step=step, suspect="node2") for step in (1, 2)]
    decision = decide(twice, 9, {"node1", "node2"})
    assert str(decision) == "requeue"
    assert "node2 failed 2 times, but too few other nodes are left" in decision.reason


def test_three_restarts_without_progress_end_the_job() -> None:
    stuck = [attempt("failed", step=5, checkpoint=4) for _ in range(4)]
    assert decide(stuck[:3], 99, AVAILABLE_NODES).action == "requeue"
    assert "no progress in 3 restarts" in decide(stuck, 99, AVAILABLE_NODES).reason
    for better in (attempt("failed", step=6, checkpoint=4), attempt("failed", step=5, checkpoint=5)):
        assert decide([*stuck[:2], better, *stuck[:2]], 99, AVAILABLE_NODES).action == "requeue"
    # SLURM stopped the job before the run made progress: this does not count
    assert decide([stuck[0], *[attempt("stopped", step=0)] * 5, stuck[0]], 99, AVAILABLE_NODES).action == "requeue"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "jobs" / "1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("launch: {max_restarts: 1}\ndistributed: {timeout_s: 60}\n")
    (folder / "log").write_text("")
    return folder


def start(job: Path, restart: int = 0, nodes: tuple[str, ...] = ("node1", "node2")) -> attempts.Decision:
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "SLURM_NTASKS_PER_NODE": "1"}
    return begin(job, variables, list(nodes), AVAILABLE_NODES)


def leave_traces(job: Path, *, step: int, checkpoint: int) -> None:
    run = job.parents[1]
    for rank in range(2):
        (run / "heartbeat").mkdir(exist_ok=True)
        beat = {"step": step, "host": f"node{rank + 1}", "time": 9e9}
        (run / "heartbeat" / f"rank_{rank}").write_text(json.dumps(beat) + "\n")
    (run / "checkpoints" / f"global_step{checkpoint}").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / f"global_step{checkpoint + 9}.part").mkdir(exist_ok=True)


def test_an_attempt_is_recorded(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(start(job)) == "run"
    leave_traces(job, step=5, checkpoint=4)
    with (job / "log").open("a") as log:
        log.write("output of the trainer\n" + KILLED)
    assert str(end(job, 137, terminated=False, restart=0, available_nodes=AVAILABLE_NODES)) == "requeue"
    assert "every rank is at step 5" in capsys.readouterr().err
    (recorded,) = read_attempts(job)
    assert (recorded.outcome, recorded.code, recorded.step, recorded.checkpoint) == ("failed", 137, 5, 4)
    assert (recorded.job, recorded.restart, recorded.nodes, recorded.suspect) == ("7", 0, ["node1", "node2"], "node2")


def test_a_new_start_clears_the_traces_of_the_last_one(job: Path) -> None:
    """Otherwise its marker, its heartbeats and its part of the log would count for the new attempt."""
    start(job)
    leave_traces(job, step=5, checkpoint=4)
    (job / "log").write_text(REFUSED)
    (job.parents[1] / "preempted").write_text("{}")
    assert str(end(job, 0, terminated=False, restart=0, available_nodes=AVAILABLE_NODES)) == "requeue"
    assert start(job, restart=1).reason == "resumes from step 4"
    assert not (job.parents[1] / "preempted").exists()
    assert str(end(job, 1, terminated=False, restart=1, available_nodes=AVAILABLE_NODES)) == "requeue"
    assert [(past.outcome, past.step) for past in read_attempts(job)] == [("preempted", 5), ("failed", -1)]


def test_an_attempt_that_was_lost_with_its_first_node(job: Path) -> None:
    """Only running.json is left; SLURM restarts the job, and the next start records the lost attempt."""
    start(job)
    leave_traces(job, step=5, checkpoint=4)
    assert str(start(job, restart=1)) == "run"
    (recorded,) = read_attempts(job)
    assert (recorded.outcome, recorded.code, recorded.step, recorded.suspect) == ("lost", None, 5, "node1")
    # launch.max_restarts is used up: the job ends, although SLURM restarted it
    assert start(job, restart=2).action == "end"


def test_a_save_that_slurm_interrupts_is_not_a_failure(job: Path) -> None:
    start(job)
    (job / "log").write_text(REQUEUED)
    assert str(start(job, restart=1)) == "run"
    (recorded,) = read_attempts(job)
    assert (recorded.outcome, recorded.suspect) == ("stopped", None)


def test_a_start_that_slurm_lost_does_not_change_the_files_of_the_next(job: Path) -> None:
    """Its node lost the connection to the controller, but not the disk."""
    start(job)
    start(job, restart=1)
    running = (job / "running.json").read_text()
    assert end(job, 1, terminated=False, restart=0, available_nodes=AVAILABLE_NODES).action == "end"
    assert (job / "running.json").read_text() == running
    assert [past.outcome for past in read_attempts(job)] == ["lost"]


def test_slurm_restarts_a_job_on_the_node_that_it_lost_twice(job: Path) -> None:
    """The job requests other nodes once; then it runs on the nodes that it gets."""
    (job / "recipe.yaml").write_text("launch: {max_restarts: 9}\ndistributed: {timeout_s: 60}\n")
    assert str(start(job)) == str(start(job, restart=1)) == "run"
    assert str(start(job, restart=2)) == "requeue node1"
    assert str(start(job, restart=3)) == "run"
    assert [past.outcome for past in read_attempts(job)] == ["lost", "lost", "stopped"]


def test_a_job_that_slurm_restarts_on_other_nodes_runs(job: Path) -> None:
    (job / "recipe.yaml").write_text("launch: {max_restarts: 9}\ndistributed: {timeout_s: 60}\n")
    start(job)
    start(job, restart=1)
    assert str(start(job, restart=2, nodes=("node2", "node3"))) == "run"


def test_files_that_a_lost_node_spoiled_do_not_end_the_job(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(job).action == "run"
    end(job, code=1, terminated=False, restart=0, available_nodes=set())
    with (job / "attempts.jsonl").open("ab") as file:
        file.write(b'\0\0\n[1]\n{"job": "7"}\n')
    (job / "running.json").write_bytes(b"\0\0\0")
    assert start(job, restart=1).action == "run"
    assert [each.outcome for each in read_attempts(job)] == ["failed"]
    said = capsys.readouterr().err
    assert "running.json cannot be read, so one attempt is not recorded" in said
    assert [f"line {number} is no attempt and is dropped" in said for number in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        True,
    ]
