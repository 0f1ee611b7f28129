"""A build that is ended at any moment, by SIGKILL too, continues to the same bytes; the second of two is refused."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import launching
import pytest
from generated_rows import write_jsonl, write_rows

from data_tools.build import build
from data_tools.check import check
from mirage_ds.errors import DataError, OwnerError

LARGE = 10**9
COMMAND = [sys.executable, "-c", "from data_tools import cli; cli.main()", "build"]
NUM_KILLS = 20


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(rows: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    """The command with 2 workers, in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, ["--input", rows, "--output", output, "--maxcount", 10, "--workers", 2, *more])],
        env=launching.environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def complete_shards(output: Path) -> list[Path]:
    return list(Path(f"{output}.unfinished").glob("train.facts/*.json"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows; every 50th cannot be used."""
    path = write_rows(tmp_path_factory.mktemp("rows"), 400)
    lines = path.read_text().splitlines()
    lines[7::50] = ["{"] * len(lines[7::50])
    path.write_text("".join(line + "\n" for line in lines))
    return path


def works(process: subprocess.Popen[str], output: Path) -> bool:
    """Whether a start has come to its work, or to its end."""
    owners = output.parent.glob(f".{output.name}.owner/*.json")
    return process.poll() is not None or any(f'"pid": {process.pid},' in path.read_text() for path in owners)


def test_killed_at_random_moments_it_continues_to_the_same_bytes(rows: Path, tmp_path: Path) -> None:
    """All processes of the group are killed, at moments between a start's first work and its end."""
    options = ["--max-rejects", 8, "--val-fraction", 0.2, "--shuffle-seed", 1]
    undisturbed = start(rows, tmp_path / "undisturbed" / "shards", *options)
    wait_until(partial(works, undisturbed, tmp_path / "undisturbed" / "shards"))
    begin = time.monotonic()
    assert undisturbed.wait(timeout=60) == 0
    takes_s = time.monotonic() - begin
    undisturbed.communicate()
    expected = file_bytes(tmp_path / "undisturbed")
    moments, rounds = random.Random(0), 0
    kills: list[tuple[int, int]] = []  # complete shards before the start that was killed, and after it

    def enough() -> bool:
        """Kills, and of them after a shard of their start."""
        return len(kills) >= NUM_KILLS and sum(after > before for before, after in kills) >= 5

    while not enough():
        rounds += 1
        output = tmp_path / f"round-{rounds}" / "shards"
        code = -signal.SIGKILL
        while code != 0:
            before = len(complete_shards(output))
            process = start(rows, output, *options)
            wait_until(partial(works, process, output))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(None if enough() else moments.uniform(0, 0.8 * takes_s))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills.append((before, len(complete_shards(output))))
                if kills[-1][0] == kills[-1][1]:
                    takes_s *= 1.1  # other work on the machine makes starts slower than the first one was
            said, _ = process.communicate(timeout=60)
            code = process.returncode
            if "the output already exists" in said:  # killed after its last step
                code = 0
            assert code in (0, -signal.SIGKILL), said
        # Killed between the last shard's move and its end it leaves hidden files beside the outputs.
        found = file_bytes(output.parent)
        assert {name: data for name, data in found.items() if not name.startswith(".")} == expected


def test_a_killed_build_leaves_no_process(rows: Path, tmp_path: Path) -> None:
    """Only the first process is killed, as by a system with too little memory; its workers end by themselves."""
    process = start(rows, tmp_path / "shards", "--max-rejects", 8)
    wait_until(partial(complete_shards, tmp_path / "shards"))
    process.kill()
    process.communicate(timeout=60)  # until no process has its output open any more


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_leaves_what_continues(rows: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The whole group gets it, as from a terminal or SLURM."""
    output = tmp_path / "out" / "shards"
    process = start(rows, output, "--max-rejects", 8)
    wait_until(partial(complete_shards, output))
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert re.search(rf"complete shards that are kept: \d+ \({output}\.unfinished\); the same command continues", said)
    assert "Traceback" not in said
    kept = {path.name: path.stat().st_mtime_ns for path in complete_shards(output)}
    assert [path.name for path in output.parent.iterdir()] == ["shards.unfinished"]
    read = []
    build(
        rows, output, maxcount=10, maxsize=LARGE, max_rejects=8, report=lambda done, fraction: read.append(done)
    )  # with another number of workers
    assert min(read) > 10 * len(kept), "rows of complete shards were not read again"
    assert list(check(output)) == []


def test_of_two_builds_the_second_is_refused(rows: Path, tmp_path: Path) -> None:
    first = start(rows, tmp_path / "shards", "--max-rejects", 8, "--val-fraction", 0.1)
    wait_until(Path(tmp_path, "shards.unfinished", "build.json").exists)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        for output in ("shards", "shards-val"):
            with pytest.raises(OwnerError, match=rf"another program writes to this output .*process {first.pid} on"):
                build(rows, tmp_path / output, maxcount=10, maxsize=LARGE)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "shards-val"]


class Interrupted(Exception):
    """Raised by a test where a build must end."""


def interrupt(rows: Path, output: Path, after: int, **options: Any) -> None:
    """Leaves an unfinished build of so many rows."""

    def report(done: int, fraction: float) -> None:
        if done >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(rows, output, report=report, **options)


def text_rows(count: int) -> list[dict[str, str]]:
    return [{"text_input": f"Q {number}", "text_output": "A"} for number in range(count)]


def test_other_options_are_refused(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(100))
    other = write_jsonl(tmp_path / "other.jsonl", text_rows(100))
    output, options = tmp_path / "shards", dict(maxcount=10, maxsize=LARGE)
    interrupt(rows, output, 50, **options)
    kept = file_bytes(tmp_path / "shards.unfinished")
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (rows, {"maxcount": 20}, "maxcount was 10 and is 20"),
        (rows, {"shuffle_seed": 1}, "shuffle_seed was None and is 1"),
        (rows, {"val_fraction": 0.5}, "val_fraction was None and is 0.5"),
        ([rows, other], {}, r"input was \['.*rows.jsonl'\] and is \['.*rows.jsonl', '.*other.jsonl'\]"),
    ]
    for paths, more, message in wrong:
        with pytest.raises(DataError, match=rf"(?s)has other options .*{message}.*rm -r '.*shards.unfinished'"):
            build(paths, output, **{**options, **more})
    assert file_bytes(tmp_path / "shards.unfinished") == kept
    build(rows, output, workers=2, max_rejects=5, **options)  # these change no byte
    build(rows, tmp_path / "single", **options)
    assert file_bytes(output) == file_bytes(tmp_path / "single")


def test_what_continues_is_only_said_where_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(100))
    interrupt(rows, tmp_path / "shards", 50, maxcount=10, maxsize=LARGE)
    assert "; the same command continues" in capsys.readouterr().err
    with pytest.raises(DataError, match="has other options"):
        build(rows, tmp_path / "shards", maxcount=20, maxsize=LARGE)
    said = capsys.readouterr().err
    assert "complete shards that are kept" in said
    assert "the same command continues" not in said


def test_with_changed_rows_it_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(100))
    options = dict(maxcount=10, maxsize=LARGE)
    interrupt(rows, tmp_path / "shards", 50, **options)
    write_jsonl(rows, [*text_rows(99), {"text_input": "other", "text_output": "A"}])
    build(rows, tmp_path / "shards", **options)
    assert re.search(
        r"the rows have changed .*begins again; complete shards that are deleted: \d", capsys.readouterr().err
    )
    build(rows, tmp_path / "single", **options)
    assert file_bytes(tmp_path / "shards") == file_bytes(tmp_path / "single")


def test_a_folder_that_is_no_build_is_not_touched(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(3))
    (tmp_path / "shards.unfinished").mkdir()
    (tmp_path / "shards.unfinished" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match=r"not an unfinished build: no build.json \(.*shards.unfinished\)"):
        build(rows, tmp_path / "shards", maxcount=10, maxsize=LARGE)
    assert file_bytes(tmp_path / "shards.unfinished") == {"mine.txt": b"keep"}


def test_rejects_after_the_last_sample_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build ends when all shards are cut, before the manifest is written; rows after the last sample come again."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [*text_rows(10), {"text_input": "no answer"}])
    options = dict(maxcount=4, maxsize=LARGE, max_rejects=1)

    def interrupted(*arguments: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("data_tools.build.write_manifest", interrupted)
        with pytest.raises(Interrupted):
            build(rows, tmp_path / "shards", **options)
    _, rejects = build(rows, tmp_path / "shards", **options)
    assert [reject["where"] for reject in rejects] == [f"{rows}:11"]
    build(rows, tmp_path / "single", **options)
    assert file_bytes(tmp_path / "shards") == file_bytes(tmp_path / "single")


def test_a_file_of_beginnings_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(100))
    options = dict(maxcount=10, maxsize=LARGE, shuffle_seed=1)
    interrupt(rows, tmp_path / "shards", 50, **options)
    begins = tmp_path / "shards.unfinished" / "begins"
    begins.write_bytes(begins.read_bytes()[: 80 * 18])
    build(rows, tmp_path / "shards", **options)
    build(rows, tmp_path / "single", **options)
    assert file_bytes(tmp_path / "shards") == file_bytes(tmp_path / "single")


def test_a_damaged_shard_is_built_again(tmp_path: Path) -> None:
    """A machine that stopped may have left a shard that is shorter than its file of facts says."""
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(100))
    options = dict(maxcount=10, maxsize=LARGE)
    interrupt(rows, tmp_path / "shards", 50, **options)
    shard = tmp_path / "shards.unfinished" / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    build(rows, tmp_path / "shards", **options)
    build(rows, tmp_path / "single", **options)
    assert file_bytes(tmp_path / "shards") == file_bytes(tmp_path / "single")


@pytest.mark.parametrize("shuffle", [[], ["--shuffle-seed", "1"]], ids=["in order", "shuffled"])
def test_memory_does_not_depend_on_the_number_of_rows(tmp_path: Path, shuffle: list[str]) -> None:
    """The largest memory of the first process, in which all rows meet."""
    script = (
        "import resource, subprocess, sys; from data_tools import cli\ntry:\n    cli.main()\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    most = []
    for count in (1_500, 15_000):
        rows = write_jsonl(tmp_path / f"{count}.jsonl", [{"text_input": "Q" * 500, "text_output": "A"}] * count)
        arguments = ["--input", rows, "--output", tmp_path / str(count), "--maxcount", "1000", "--workers", "2"]
        done = subprocess.run(
            [sys.executable, "-c", script, "build", *map(str, arguments), *shuffle],
            env=launching.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        most.append(int(done.stderr.splitlines()[-1]))
        assert json.loads((tmp_path / str(count) / "manifest.json").read_text())["num_samples"] == count
    assert most[1] < 1.2 * most[0]
