"""`mirage evaluate` by several processes: the bytes of one process, also after SIGKILL; mistakes are said once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
from launching import Ranks
from talkative import write_questions, write_talkative

NUM_ROWS, BATCH_SIZE, TIMEOUT_S = 26, 4, 300
ARMS = ("--latents", "shuffled,zeroed", "--image", "gray")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and questions."""
    folder = tmp_path_factory.mktemp("ground")
    write_talkative(folder / "talkative", {"<|latent_start|>": 3.0, "<|im_end|>": 2.0})
    write_questions(folder / "rows", NUM_ROWS)
    return folder


def options(ground: Path, output: Path) -> list[str]:
    files = ("--model", ground / "talkative" / "model", "--data", ground / "rows" / "questions.jsonl")
    sizes = ("--latent-size", 3, "--max-new-tokens", 16, "--batch-size", BATCH_SIZE)
    return [str(each) for each in (*files, "--output", output, "--task", "vsp-spatial-planning", *sizes, *ARMS)]


def evaluate(*arguments: str) -> None:
    """What `mirage evaluate ARGUMENTS` does, but for the check of versions."""
    from mirage_ds import errors
    from mirage_ds.cli import app

    sys.argv = ["mirage", "evaluate", *arguments]
    errors.run(app)


def start(num_ranks: int, ground: Path, output: Path, *more: str) -> Ranks:
    arguments = [*options(ground, output), *more]
    return launching.start(num_ranks, *arguments, main=evaluate, log=output.parent / f"{output.name}-{num_ranks}.log")


@pytest.fixture(scope="module")
def whole(ground: Path) -> Path:
    """The results of one process that is not interrupted."""
    with start(1, ground, ground / "whole") as rank:
        rank.finish(TIMEOUT_S)
    return ground / "whole"


def test_two_ranks_give_the_bytes_of_one(ground: Path, whole: Path) -> None:
    with start(2, ground, ground / "two") as ranks:
        printed = ranks.finish(TIMEOUT_S)
    assert (ground / "two").read_bytes() == whole.read_bytes()
    summaries = [json.loads(Path(f"{path}.summary.json").read_text()) for path in (ground / "two", whole)]
    assert summaries[0] == summaries[1]
    assert printed.count("latent_size 3") == printed.count("in brackets: 95% intervals") == 1, "both ranks print"
    assert not Path(f"{ground / 'two'}.parts").exists()


def test_killed_and_continued(ground: Path, whole: Path) -> None:
    """Two ranks get SIGKILL in the middle; one process continues, and is killed too; two finish."""
    output = ground / "killed"
    kept = 0
    for num_ranks in (2, 1):
        with start(num_ranks, ground, output) as ranks:
            wait_for_batches(ranks, Path(f"{output}.parts"), kept + 2)
            ranks.kill()
        assert not output.exists()
        kept = num_batches(Path(f"{output}.parts"))
    with start(2, ground, output) as ranks:
        printed = ranks.finish(TIMEOUT_S)
    assert f"of {4 * NUM_ROWS} answers are there" in printed
    assert kept < 4 * -(-NUM_ROWS // BATCH_SIZE), "it was killed too late to test anything"
    assert output.read_bytes() == whole.read_bytes()


def num_batches(parts: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in parts.glob("rank_*.jsonl"))


def wait_for_batches(ranks: Ranks, parts: Path, wanted: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while num_batches(parts) < wanted:
        assert ranks.code is None, ranks.log.read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_mistake_is_said_once(ground: Path) -> None:
    """One of the command line, one that only the first rank can find, and one in an answer that the second scores."""
    with start(2, ground, ground / "refused", "--task", "nope") as ranks:
        assert ranks.wait(TIMEOUT_S) == 2
    assert ranks.log.read_text().count("unknown task 'nope'") == 1
    with start(2, ground, ground / "other") as ranks:
        wait_for_batches(ranks, ground / "other.parts", 1)
        ranks.kill()
    with start(2, ground, ground / "other", "--limit", "5") as ranks:
        assert ranks.wait(TIMEOUT_S) == 2
    log = ranks.log.read_text()
    assert log.count("has limit=None, this one limit=5") == 1
    assert "Traceback" not in log
    task = ground / "task.py"
    task.write_text("def score(row, answer):\n    return 1 / (not answer or row['id'] != 3)\n")
    with start(2, ground, ground / "failed", "--task", f"{task}:score") as ranks:
        assert ranks.wait(TIMEOUT_S) == 2
    log = ranks.log.read_text()
    assert log.count("questions.jsonl:4: the task's function failed: ZeroDivisionError") == 1
    assert "Traceback" not in log
    assert num_batches(ground / "failed.parts") == 4 * -(-NUM_ROWS // BATCH_SIZE)


@pytest.mark.slow
def test_mirage_launch(ground: Path, whole: Path) -> None:
    """The launcher's own ranks; it ends both with a Ctrl-C, and its second start continues."""
    output = ground / "launched"
    command = [str(launching.BIN / "mirage-launch"), "evaluate", "--ranks", "2", *options(ground, output)]
    with (ground / "launched.log").open("w") as log:
        process = subprocess.Popen(command, env=launching.environment(), stdout=log, stderr=log)
        deadline_s = time.monotonic() + TIMEOUT_S
        while num_batches(Path(f"{output}.parts")) < 2:
            assert time.monotonic() < deadline_s
            assert process.poll() is None, (ground / "launched.log").read_text()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(TIMEOUT_S)
        assert not output.exists()
        done = subprocess.run(command, env=launching.environment(), stdout=log, stderr=log, timeout=TIMEOUT_S)
    assert done.returncode == 0, (ground / "launched.log").read_text()
    assert output.read_bytes() == whole.read_bytes()
