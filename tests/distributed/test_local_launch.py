"""`mirage-launch local` with the trainer itself, 2 ranks with DataLoader workers: signals, and an error of one rank."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import launching
import psutil
import pytest
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.data.index import load_index
from mirage_ds.data.shards import load_manifest
from mirage_ds.hf.preset import write_tiny

pytestmark = pytest.mark.slow  # tests/unit/launch/test_local.py has ranks that stand in

ROOT = Path(__file__).parents[2]
DEADLINE_S = 200


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, log.read_text()[-4000:]
        time.sleep(0.05)


def last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Whatever runs with the folder in its command line: launcher, ranks and, as forks, their workers."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and f"run.dir={run_dir}" in words:
            found.append(process)
    return found


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Starts a long run in tmp_path/run, or resumes it."""
    rows = write_rows(tmp_path / "rows", 10)
    write_tiny(rows, tmp_path / "model", seed=0)
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    command = [str(launching.BIN / "mirage-launch"), "local", str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")]
    command += ["--ranks", "2", f"model.path={tmp_path / 'model'}", f"data.shards={tmp_path / 'shards'}"]
    return [*command, f"run.dir={tmp_path / 'run'}", "run.resume=auto", "train.max_steps=100000", "data.num_workers=2"]


@pytest.fixture
def start(tmp_path: Path, command: list[str]):
    """Starts the run, which a second start resumes, and waits for a step of this start."""
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def action() -> subprocess.Popen[bytes]:
        done = last_step(run_dir)
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=launching.environment(), stdout=output, stderr=subprocess.STDOUT)
        wait_until(lambda: last_step(run_dir) > done or process.poll() is not None, log)
        assert process.poll() is None, log.read_text()[-4000:]
        assert len(processes_of(run_dir)) == 1 + 2 + 2 * 2
        return process

    yield action
    for process in processes_of(run_dir):
        process.kill()


def test_a_signal_leaves_no_process(start, tmp_path: Path) -> None:
    """SIGTERM: the run saves, and all has ended when the launcher has. SIGKILL: the run resumes, and ends by itself."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE_S) == 0, log.read_text()[-4000:]
    assert processes_of(run_dir) == []
    saved = json.loads((run_dir / "preempted").read_text())["step"]
    assert (run_dir / "checkpoints" / f"global_step{saved}").is_dir()
    assert last_step(run_dir) == saved

    process = start()
    assert f"Resuming from {run_dir}/checkpoints/global_step{saved}" in log.read_text()
    process.kill()
    process.wait()
    wait_until(lambda: processes_of(run_dir) == [], log)


def test_an_error_of_one_rank_is_the_only_one(tmp_path: Path, command: list[str]) -> None:
    """One rank meets a damaged sample; the other, whose collective fails then, prints nothing."""
    shards = load_manifest(tmp_path / "shards")
    sample = load_index(shards)[5]
    shard = tmp_path / "shards" / shards.manifest.shards[sample.shard].name
    content = bytearray(shard.read_bytes())
    content[sample.offset : sample.offset + 5] = b"wrong"
    shard.write_bytes(content)
    result = subprocess.run(
        command, env=launching.environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert result.returncode == 2
    error, first, last = result.stderr.splitlines()
    assert error.startswith(f"error: damaged shard: bad checksum ({shard.name}/{sample.key})")
    assert first.endswith("ended with exit code 2; ending the other ranks")
    assert last.endswith("failed first, with exit code 2; read its message above")
    assert "Traceback" not in result.stdout
    assert processes_of(tmp_path / "run") == []
