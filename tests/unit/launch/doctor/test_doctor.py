"""`mirage-launch doctor` under real conditions: a killed build's lock, damaged shards, a full disk, orphaned ranks, and
two processes that measure the network between them.
"""

import io
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
import yaml
from generated_rows import write_rows
from rich.console import Console
from torch.utils import cpp_extension

from data_tools.build import build
from launch.doctor import findings, machine_checks, op_checks, recipe_checks
from launch.doctor.findings import Report, Row, merge
from launch.doctor.network_checks import check_same
from mirage_ds.config import Config
from mirage_ds.errors import DataError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config

RECIPE = Path(__file__).parents[4] / "launch" / "recipes" / "tiny-stage1.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and shards."""
    place = tmp_path_factory.mktemp("doctor")
    rows = write_rows(place / "rows", 10)
    write_tiny(rows, place / "model", seed=0)
    build(rows, place / "shards", maxcount=4, maxsize=10**9)
    return place


def overrides(data: Path) -> list[str]:
    return [f"model.path={data}/model", f"data.shards={data}/shards", f"run.dir={data}/runs/a"]


def configure(data: Path, *more: str) -> Config:
    return load_config(RECIPE, [*overrides(data), *more])


def test_the_lock_of_a_killed_build_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [row.state for row in op_checks.check_locks()] == ["ok"]
    # torch takes the lock as in a build; the process is killed before it can release it
    code = (
        "import os, signal\n"
        "from torch.utils import cpp_extension as e\n"
        "from torch.utils.file_baton import FileBaton\n"
        "FileBaton(os.path.join(e._get_build_directory('cpu_adam', False), 'lock')).try_acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (row,) = op_checks.check_locks()
    lock = tmp_path / "cpu_adam" / "lock"
    assert row.state == "fail"
    assert "cpu_adam has been locked for " in row.found
    assert row.remedy.endswith(f"rm {lock}")
    subprocess.run(row.remedy.split(": ")[-1].split(), check=True)
    assert [row.state for row in op_checks.check_locks()] == ["ok"]


def test_a_folder_for_compiled_ops_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    (row,) = op_checks.check_locks()
    assert row.state == "fail"
    assert "TORCH_EXTENSIONS_DIR" in row.remedy


def test_the_op_that_offload_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = op_checks.check_ops({"zero_optimization": {"stage": 3}})
    assert "needs none" in row.found
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(op_checks, "installed_ops", {})
    (row,) = op_checks.check_ops(offload)
    assert (row.what, row.state) == ("DeepSpeed cpu_adam", "ok")
    assert "not compiled yet" in row.found
    monkeypatch.setenv("CXX", "no-such-compiler")
    (row,) = op_checks.check_ops(offload)
    assert row.state == "fail"
    assert "missing: g++" in row.found


def test_shards_are_read(data: Path) -> None:
    (row,) = recipe_checks.check_shards(configure(data))
    assert row.state == "ok"
    assert row.found.startswith("10 samples in 3 shards")
    more = [f"evaluation.shards={data}/nothing"]
    first, second = recipe_checks.check_shards(configure(data, *more))
    assert (first.what, first.state) == ("data.shards", "ok")
    assert (second.what, second.state) == ("evaluation.shards", "fail")
    assert f"{data}/nothing/manifest.json" in second.found
    assert "build one" in second.remedy


def test_what_evaluations_ask(data: Path) -> None:
    """Nothing where a run makes none; else the task with the arms, and the rows."""
    assert not list(recipe_checks.check_evaluation(configure(data)))
    asks = ["evaluation.task=exact", f"evaluation.rows={data}/shards"]
    assert [row.state for row in recipe_checks.check_evaluation(configure(data, *asks))] == ["ok", "ok"]
    asks = ["evaluation.task=exact", "evaluation.latents=meen", f"evaluation.rows={data}/nothing"]
    task, rows = recipe_checks.check_evaluation(configure(data, *asks))
    assert (task.what, task.state, task.remedy) == ("evaluation.task", "fail", "correct the list")
    assert "'meen' is unknown" in task.found
    assert (rows.what, rows.state) == ("evaluation.rows", "fail")
    assert f"{data}/nothing" in rows.found


@pytest.fixture
def shard(data: Path) -> Iterator[Path]:
    """The last shard; restored afterwards."""
    path = data / "shards" / "shard-000002.tar"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def test_damaged_shards_are_named(data: Path, shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])  # copied incompletely
    (row,) = recipe_checks.check_shards(configure(data))
    assert row.state == "fail"
    assert str(shard) in row.found
    shard.write_bytes(bytes(len(content)))  # a hole, as a file system leaves one after a crash
    (row,) = recipe_checks.check_shards(configure(data))
    assert row.state == "fail"
    assert "shard-000002.tar" in row.found
    assert "copy" in row.remedy


def test_a_model_that_does_not_exist(data: Path, tmp_path: Path) -> None:
    assert recipe_checks.check_model(configure(data)).state == "ok"
    (tmp_path / "empty").mkdir()
    row = recipe_checks.check_model(configure(data, f"model.path={tmp_path}/empty"))
    assert row.state == "fail"
    assert str(tmp_path / "empty") in row.found


def test_attention_that_cannot_run(data: Path) -> None:
    assert recipe_checks.check_attention(configure(data)).found == "sdpa (flash-attn needs a GPU)"
    # in fp32, on any machine
    row = recipe_checks.check_attention(configure(data, "model.attention=flash_attention_2"))
    assert row.state == "fail"
    assert "set model.attention=auto" in row.remedy


def test_free_space_in_folders(tmp_path: Path) -> None:
    row = machine_checks.check_folder("TMPDIR", tmp_path)
    assert "GiB free" in row.found
    row = machine_checks.check_folder("run.dir", tmp_path / "not" / "yet" / "there")
    assert "GiB free" in row.found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    row = machine_checks.check_folder("run.dir", tmp_path / "file")
    assert row.state == "fail"
    assert "Not a directory" in row.found


def test_a_full_disk(tmp_path: Path) -> None:
    """A tmpfs of 512 KiB in its own mount namespace: less than the check writes."""
    code = (
        "from pathlib import Path; from launch.doctor.machine_checks import check_folder; "
        "print(check_folder('TMPDIR', Path('/mnt')))"
    )
    mount = "mount -t tmpfs -o size=512k tmpfs /mnt"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs in a mount namespace")
    command = [*namespace, f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    result = subprocess.run(command, env=launching.environment(), capture_output=True, text=True, timeout=300)
    assert "state='fail'" in result.stdout, result.stderr
    assert "No space left on device (/mnt)" in result.stdout


def test_too_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        row = machine_checks.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert row.state == "warn"
    assert row.found.startswith("512 open files")
    assert "ulimit -n" in row.remedy


@pytest.mark.parametrize(
    ("arguments", "rank"),
    [
        (["-u", "-m", "mirage_ds.train", "--local_rank=0", "recipe.yaml"], True),
        (["-u", "-m", "deepspeed.launcher.launch", "--module", "mirage_ds.train", "recipe.yaml"], True),
        (["bin/deepspeed", "--module", "mirage_ds.train", "recipe.yaml"], False),
        (["-m", "pytest", "mirage_ds.train"], False),
    ],
)
def test_an_orphaned_process_is_reported_if_it_is_a_rank(arguments: list[str], rank: bool) -> None:
    """A process that only has these arguments; the one that started it has ended."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)", *arguments]
    code = f"import subprocess as s; print(s.Popen({sleeper!r}, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    try:
        parent = {number: parent for number, parent, _ in machine_checks.processes()}[pid]
        if parent != 1:
            pytest.skip(f"orphans go to process {parent} here, not to 1")
        row = machine_checks.check_orphans()
        assert (str(pid) in row.remedy.split("kill ")[-1]) == rank
        assert not rank or row.state == "warn"
    finally:
        os.kill(pid, signal.SIGKILL)


def test_findings_of_several_nodes_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    same, low = Row("versions", "1"), Row("TMPDIR", "0 GiB free", "warn", "free [some]")
    much, after = Row("TMPDIR", "9 GiB free"), Row("SLURM", "2 nodes")
    reports = [Report("a", [same, much, after], {"torch": "2"}), Report("b", [same, low, after], {"torch": "3"})]
    assert merge(reports) == [("all", same), ("a", much), ("b", low), ("all", after)]
    (row,) = check_same(reports)
    assert row.state == "fail"
    assert "a: 2, b: 3" in row.found
    text = io.StringIO()
    console = Console(file=text, width=120)
    monkeypatch.setattr(findings, "wide_console", lambda: console)
    findings.show(merge(reports), several_hosts=True)
    assert "free [some]" in text.getvalue()


def test_what_to_do_is_the_last_part_of_an_error() -> None:
    row = findings.failure("shards", DataError("wrong (here); expected this; do that"))
    assert (row.found, row.remedy) == ("wrong (here); expected this", "do that")


def doctor(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from launch.cli import main; main()", "doctor", *arguments],
        env=launching.environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_ranks_measure_the_network_and_their_clocks(data: Path, tmp_path: Path) -> None:
    """Rank 1 has other shards and a clock that is 100 s behind: Python's time, shifted at its start."""
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() - 100\n")
    other = data / "other"
    rows = write_rows(data / "other-rows", 3)
    build(rows, other, maxcount=4, maxsize=10**9)
    recipe = data / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configure(data).model_dump(mode="json")))
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port())}
    late = {"PYTHONPATH": f"{tmp_path}:{launching.environment()['PYTHONPATH']}"}
    ranks = [
        doctor(str(recipe), RANK="0", LOCAL_RANK="0", **rendezvous),
        doctor(str(recipe), f"data.shards={other}", RANK="1", LOCAL_RANK="0", **late, **rendezvous),
    ]
    try:
        (output, error), (silent, _) = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1, error
    assert silent == ""
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", output).split())
    assert float(re.search(r"([\d.e+-]+) GB/s bus bandwidth", text)[1]) > 0
    offset_ms, error_ms = re.search(r"offset from rank 0: ([\d.]+) ms .*?([\d.]+) ms\)", text).groups()
    assert float(offset_ms) == pytest.approx(100_000, abs=float(error_ms) + 1)
    assert "same data.shards" in text
    assert "10 samples in 3 shards" in text
    assert "3 samples in 1 shard " in text


def test_exit_codes(data: Path) -> None:
    good = doctor(str(RECIPE), *overrides(data))
    wrong = doctor(str(RECIPE), "train.lrr=1")
    try:
        output, error = good.communicate(timeout=300)
        assert good.returncode == 0, output + error
        assert "losses are right" in output
        _, error = wrong.communicate(timeout=300)
    finally:
        good.kill()
        wrong.kill()
    assert wrong.returncode == 2
    assert "did you mean 'lr'" in error
