"""The writer process by itself: what it writes is what was copied, and which ends it survives.

SIGSTOP holds a writer, so that what happens before it writes does not depend on time. With an engine and a real run:
tests/distributed/test_background_saves.py.
"""

import hashlib
import multiprocessing
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirage_ds.checkpoint import host_copy, host_memory
from mirage_ds.checkpoint.writer import IGNORED, Writer
from mirage_ds.checkpoint.written import write_state


@pytest.fixture
def writer() -> Iterator[Writer]:
    found = Writer()
    yield found
    found.end()


def states() -> dict[str, Any]:
    whole = torch.arange(3000.0)
    weight = torch.nn.Parameter(torch.randn(7, 5))
    return {
        "first.pt": {
            "views": [whole[10:20], whole[::3], whole],
            "parameter": weight,
            "transposed": weight.detach().t(),
            "empty": [torch.empty(0, dtype=torch.int64), torch.empty(0)],
            "random": torch.get_rng_state(),
            "rest": {"step": 3, "shape": torch.Size([2, 3])},
        },
        "second.pt": [torch.randn(1000).bfloat16(), torch.tensor(4.0)],
    }


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def test_the_files_hold_the_state_of_the_copy(writer: Writer, tmp_path: Path) -> None:
    """As torch.save writes it, views of one storage once; and a larger state after a smaller one."""
    for factor in (1, 50):
        folder, own = tmp_path / str(factor), states()
        own["second.pt"].append(torch.randn(1000 * factor))
        folder.mkdir()
        for name, state in own.items():
            torch.save(state, folder / f"plain-{name}")
        os.kill(writer.pid, signal.SIGSTOP)
        writer.begin(folder, own, read_back=False)
        assert not writer.is_done()
        for tensor in tensors(own):
            tensor.detach().zero_()  # training continues
        os.kill(writer.pid, signal.SIGCONT)
        written = writer.wait()
        assert written.error is None
        for name in own:
            expected, found = (torch.load(folder / file, weights_only=True) for file in (f"plain-{name}", name))
            for one, other in zip(tensors(expected), tensors(found), strict=True):
                assert (one.dtype, one.stride(), type(one)) == (other.dtype, other.stride(), type(other))
                assert torch.equal(one, other)
            content = (folder / name).read_bytes()
            assert written.files[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            assert zipfile.ZipFile(folder / name).testzip() is None
        assert found[1].item() == 4.0
        views = torch.load(folder / "first.pt", weights_only=True)["views"]
        assert len({view.untyped_storage().data_ptr() for view in views}) == 1


def test_on_gpus_the_memory_is_pinned_exactly_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA driver: each mapping is registered, and unregistered before it goes; also if refused."""
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        pinned[address] = size
        return 0 if size < 10**6 else 2

    def check(code: int) -> None:
        if code:
            pinned.popitem()
            raise RuntimeError("CUDA error: out of memory")

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0 * pinned.pop(address))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(host_copy, "_on_cuda", lambda: True)
    copy = host_copy.HostCopy()
    for size in (4096, 8192):
        copy.reserve(size)
        assert pinned == {copy.memory.data_ptr(): size}
    with pytest.raises(RuntimeError, match="out of memory"):
        copy.reserve(10**6)
    copy.release()
    assert not pinned
    assert os.fstat(copy.descriptor).st_size == 0
    os.close(copy.descriptor)


def test_signals_to_all_processes_of_a_job_leave_it_alive(writer: Writer, tmp_path: Path) -> None:
    for number in IGNORED:
        os.kill(writer.pid, number)
    writer.begin(tmp_path, states(), read_back=False)
    assert writer.wait().error is None


def test_a_killed_writer_is_named(tmp_path: Path) -> None:
    """While it writes, and while it waits for the next save."""
    for begin_first in (True, False):
        writer = Writer()
        os.kill(writer.pid, signal.SIGSTOP if begin_first else signal.SIGKILL)
        if not begin_first:
            os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
        writer.begin(tmp_path, states(), read_back=False)
        os.kill(writer.pid, signal.SIGKILL)
        written = writer.wait()
        assert written.error == f"the process that writes its files (pid {writer.pid}) was ended by SIGKILL"


def test_a_fault_of_the_writer_is_no_success(writer_log: None, tmp_path: Path) -> None:
    """torch cannot save one storage as two types; here as in the rank itself."""
    shared = torch.zeros(4)
    writer = Writer()
    writer.begin(tmp_path, {"wrong.pt": [shared, shared.view(torch.int32)]}, read_back=False)
    assert "was ended with exit code 1" in (writer.wait().error or "")


@pytest.fixture
def writer_log(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "view the same data as different types" in capfd.readouterr().err


def hold(own: Any) -> None:
    """A rank that never ends, with a child that holds the connection: its end alone does not close that."""
    writer = Writer()
    child = os.fork()
    if child == 0:
        time.sleep(300)
        os._exit(0)
    own.send((writer.pid, child))
    signal.pause()


def test_it_does_not_outlive_its_rank() -> None:
    ours, others = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=hold, args=(others,))
    rank.start()
    pid, child = ours.recv()
    rank.kill()
    rank.join()
    deadline_s = time.monotonic() + 60
    try:
        while is_running(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("read_back", [False, True])
def test_a_disk_that_stores_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_back: bool) -> None:
    """Is found while it is saved if files are read back; otherwise by the sha256, when the checkpoint is loaded."""
    file, sync = tmp_path / "state.pt", os.fsync

    def spoil(descriptor: int) -> None:
        sync(descriptor)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(os, "fsync", spoil)
    if read_back:
        with pytest.raises(OSError, match="what was read back differs"):
            write_state(file, torch.zeros(1000), read_back=True)
    else:
        entry = write_state(file, torch.zeros(1000), read_back=False)
        assert entry["sha256"] != hashlib.sha256(file.read_bytes()).hexdigest()


def write_machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 90 kB\nMemAvailable: 80 kB\n", "proc/self/cgroup": cgroup} | files
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_the_smallest_limit_of_the_job_counts(tmp_path: Path) -> None:
    """Control groups of both versions; what the kernel frees on demand is not in use; a container's own root."""
    stat = "anon 7000\ninactive_file 3000\nactive_file 1000\n"

    def group(folder: str, limit: str, used: int) -> dict[str, str]:
        values = {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}
        return {f"sys/fs/cgroup{folder}/{name}": value for name, value in values.items()}

    two = "0::/job/step\n"
    assert host_memory.available_bytes(write_machine(tmp_path / "free", two, {})) == 80 * 1024
    found = write_machine(tmp_path / "step", two, group("/job", "max", 20000) | group("/job/step", "30000\n", 12000))
    assert host_memory.available_bytes(found) == 30000 - (12000 - 4000)
    found = write_machine(tmp_path / "job", two, group("/job", "20000", 12000) | group("/job/step", "max\n", 12000))
    assert host_memory.available_bytes(found) == 20000 - (12000 - 4000)
    found = write_machine(tmp_path / "container", "0::/docker/1\n", group("", "30000", 12000))
    assert host_memory.available_bytes(found) == 30000 - (12000 - 4000)
    one = "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n0::/\n"
    files = {"limit_in_bytes": "30000\n", "usage_in_bytes": "12000\n"}
    files |= {"stat": "inactive_file 1\ntotal_inactive_file 3000\ntotal_active_file 1000\n"}
    files = {f"sys/fs/cgroup/memory/job/memory.{name}": value for name, value in files.items()}
    assert host_memory.available_bytes(write_machine(tmp_path / "one", one, files)) == 30000 - (12000 - 4000)
