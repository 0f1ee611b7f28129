"""`mirage-launch local` with stand-ins for the trainer: who is started, told and ended, and what is reported.

Real ranks: tests/distributed/test_local_launch.py.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launching
import psutil
import pytest

from launch import local
from mirage_ds.errors import ConfigError

DEADLINE_S = 120
RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"

# Keeps what it is and the signals that it got in a file named after its rank; ends after so many signals.
STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

rank, wanted, got = os.environ["RANK"], int(sys.argv[1]), []
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) if "worker" in sys.argv else None
pids = [os.getpid()] + ([worker.pid] if worker else [])

def write():
    Path(rank + ".part").write_text(json.dumps({"pids": pids, "got": got}))
    os.replace(rank + ".part", rank)

def keep(number, frame):
    got.append(signal.Signals(number).name)
    write()

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, keep)
write()
while len(got) < wanted:
    time.sleep(0.02)
"""


def command(num_ranks: int, *arguments: str, grace_s: int = 600) -> list[str]:
    """What starts `python ARGUMENTS` as so many ranks."""
    script = (
        f"import sys; from launch.local import Launch; sys.exit(Launch(sys.argv[1:], {num_ranks}, {grace_s}).wait())"
    )
    return [sys.executable, "-c", script, sys.executable, *arguments]


def notes(folder: Path, num_ranks: int = 2) -> list[dict]:
    """What each rank has written so far."""
    files = [folder / str(rank) for rank in range(num_ranks)]
    return [json.loads(file.read_text()) if file.exists() else {"pids": [], "got": []} for file in files]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Started:
    """A launcher with ranks that stand in, once each of them is ready for signals."""

    def __init__(self, folder: Path, *arguments: str, grace_s: int = 600) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(STAND_IN)
        self.launcher = subprocess.Popen(
            command(2, "rank.py", *arguments, grace_s=grace_s), cwd=folder, env=launching.environment()
        )
        wait_until(lambda: all(note["pids"] for note in notes(folder)))
        self.pids = [pid for note in notes(folder) for pid in note["pids"]]

    def got(self) -> list[list[str]]:
        return [note["got"] for note in notes(self.folder)]

    def code(self) -> int:
        """The launcher's, after seeing that nothing is left."""
        code = self.launcher.wait(timeout=DEADLINE_S)
        assert not [pid for pid in self.pids if running(pid)]
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts launchers that end with the test."""
    started: list[Started] = []

    def action(*arguments: str, grace_s: int = 600) -> Started:
        started.append(Started(tmp_path, *arguments, grace_s=grace_s))
        return started[-1]

    yield action
    for run in started:
        run.launcher.kill()
        run.launcher.wait()


def run_ranks(num_ranks: int, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(num_ranks, "-c", code),
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_each_rank_is_told_its_place() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"import os, sys; sys.stdout.write(' '.join(os.environ[name] for name in {names}) + '\\n')"
    result = run_ranks(3, code)
    places = sorted(line.split() for line in result.stdout.splitlines())
    assert (result.returncode, result.stderr) == (0, "")
    assert [place[:5] for place in places] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({place[5] for place in places}) == 1


def test_rank_0_can_listen_on_the_port() -> None:
    """With the store that torch.distributed starts there; nobody else gets the port from the system."""
    code = (
        "import os, socket; from torch.distributed import TCPStore; port = int(os.environ['MASTER_PORT'])\n"
        "others = [socket.create_server(('127.0.0.1', 0)) for _ in range(1000)]\n"
        "assert port not in [other.getsockname()[1] for other in others]\n"
        "TCPStore('127.0.0.1', port, 1, is_master=True).set('key', 'value'); print('listens')"
    )
    result = run_ranks(1, code)
    assert (result.returncode, result.stdout) == (0, "listens\n"), result.stderr


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("sys.exit(2)", 2, "exit code 2"), ("os.kill(os.getpid(), 9)", 128 + 9, "SIGKILL"), ("1 / 0", 1, "exit code 1")],
)
def test_the_first_failure_ends_all_and_is_the_exit_code(end: str, code: int, said: str) -> None:
    result = run_ranks(3, f"import os, sys, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(600)")
    assert result.returncode == code
    assert f"mirage-launch: rank 1 ended with {said}; ending the other ranks" in result.stderr
    assert f"mirage-launch: rank 1 failed first, with {said}" in result.stderr.splitlines()[-1]


def test_who_does_not_end_after_a_failure_is_killed(start: Callable[..., Started]) -> None:
    """After SIGTERM and the grace; the workers too, those of the rank that failed first included."""
    run = start("1000", "worker", grace_s=1)
    os.kill(notes(run.folder)[0]["pids"][0], signal.SIGKILL)
    assert run.code() == 128 + signal.SIGKILL
    assert run.got() == [[], ["SIGTERM"]]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGHUP", "SIGHUP"),
        ("SIGUSR1", "SIGUSR1"),
        ("SIGUSR2", "SIGUSR2"),
        ("SIGINT", "SIGTERM"),
    ],
)
def test_a_signal_reaches_every_rank(start: Callable[..., Started], sent: str, received: str) -> None:
    """A rank that ends well after it has saved is a success, unless it was Ctrl-C. A second signal is passed on."""
    run = start("2")
    for times in (1, 2):
        run.launcher.send_signal(signal.Signals[sent])
        wait_until(lambda times=times: run.got() == [[received] * times] * 2)
    assert run.code() == (130 if sent == "SIGINT" else 0)


def test_ctrl_backslash_ends_all_at_once(start: Callable[..., Started]) -> None:
    run = start("1000", "worker")
    run.launcher.send_signal(signal.SIGQUIT)
    assert run.code() == 128 + signal.SIGKILL


def test_a_launcher_that_is_killed_takes_its_ranks_along(start: Callable[..., Started]) -> None:
    run = start("1000")
    run.launcher.kill()
    wait_until(lambda: not any(running(pid) for pid in run.pids))


def test_a_rank_whose_launcher_is_already_gone_does_not_begin(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    stranger = os.getppid()
    assert subprocess.run(["touch", begun], preexec_fn=local.die_with(stranger)).returncode != 0
    assert not begun.exists()
    assert subprocess.run(["touch", begun], preexec_fn=local.die_with(os.getpid())).returncode == 0


def start_at_a_terminal(folder: Path) -> tuple[int, int]:
    """Two ranks whose launcher has a terminal of its own; returns the launcher's pid and our end of the terminal."""
    (folder / "rank.py").write_text(STAND_IN)
    words, environment = command(2, "rank.py", "1", "worker"), launching.environment()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(words[0], words, environment)
    wait_until(lambda: all(note["pids"] for note in notes(folder)))
    return pid, terminal


def test_ctrl_c_at_a_terminal_is_one_signal_for_each_rank(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the launcher's whole process group; ranks and their workers are not in it."""
    pid, terminal = start_at_a_terminal(tmp_path)
    os.write(terminal, b"\x03")
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 130
    assert [note["got"] for note in notes(tmp_path)] == [["SIGTERM"], ["SIGTERM"]]
    assert not [pid for note in notes(tmp_path) for pid in note["pids"] if running(pid)]
    assert b"saving and ending" in os.read(terminal, 10_000)
    os.close(terminal)


def test_a_terminal_that_is_closed_is_a_hangup_for_each_rank(tmp_path: Path) -> None:
    """The system tells the launcher alone, and takes the place to print to away."""
    pid, terminal = start_at_a_terminal(tmp_path)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [note["got"] for note in notes(tmp_path)] == [["SIGHUP"], ["SIGHUP"]]


@pytest.mark.parametrize(("gpus", "asked", "started"), [(0, None, 1), (0, 3, 3), (8, None, 8), (8, 3, 3)])
def test_a_rank_for_each_gpu_unless_told(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: int | None, started: int
) -> None:
    given = []

    class Recorder:
        def __init__(self, command: list[str], num_ranks: int) -> None:
            given.append((command[-3:], num_ranks))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(local, "count_gpus", lambda: gpus)
    monkeypatch.setattr(local, "check_inputs", lambda config: None)  # there are no shards here
    monkeypatch.setattr(local, "Launch", Recorder)
    with pytest.raises(SystemExit, match="0"):
        local.local(recipe=RECIPE, overrides=["train.lr=1"], ranks=asked)
    assert given == [(["mirage_ds.train", str(RECIPE), "train.lr=1"], started)]


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ([], 3, "more ranks than GPUs (--ranks 3, on this machine): allowed are 1 to 2"),
        (["train.gradient_accumulation_steps=null", "train.global_batch_size=3"], 2, "=3 does not divide over 2 ranks"),
        (["train.learning_rate=1"], 2, "unknown key train.learning_rate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], ranks: int, words: str
) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: 2)
    monkeypatch.setattr(local, "check_inputs", lambda config: None)  # there are no shards here
    monkeypatch.delattr(local, "Launch")
    with pytest.raises(ConfigError) as error:
        local.local(recipe=RECIPE, overrides=overrides, ranks=ranks)
    assert words in str(error.value)


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [str(launching.BIN / "mirage-launch"), "local", "missing.yaml", "--ranks", "2"],
        cwd=tmp_path,
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: the recipe cannot be read (missing.yaml)")
    assert result.stderr.count("\n") == 1
