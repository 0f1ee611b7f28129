"""Checks of one machine: versions, GPUs, folders, limits, processes, SLURM and MUNGE. Each returns one row."""

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from launch.doctor.findings import Row, failure
from mirage_ds.config import DataConfig
from mirage_ds.errors import ConfigError
from mirage_ds.paths import check_temporary_folder
from mirage_ds.programs import ask
from mirage_ds.self_check import check_decoding, check_training
from mirage_ds.versions import REMEDY, newer_than_tested, versions

GIB = 2**30
PROBE_BYTES = 2**20  # size of the file that is written to test a folder
MIN_FREE_BYTES = {"run.dir": 10 * GIB, "TMPDIR": GIB}
MIN_SHM_BYTES = GIB  # Docker's default is 64 MiB, which the image batches of two workers nearly fill
MIN_OPEN_FILES = 1024
COMMAND_TIMEOUT_S = 30
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "smb", "wekafs", "panfs")


def check_packages() -> Row:
    """Versions of the packages that affect a run's numbers; command.py has checked that they are supported."""
    found = ", ".join(f"{name} {version:.12}" for name, version in versions().items())
    if newer := newer_than_tested():
        return Row("versions", f"{found}; {newer}", "warn", REMEDY)
    return Row("versions", found)


def check_computation() -> Row:
    """Whether the installed packages train and decode a tiny model as they should."""
    try:
        check_training()
        check_decoding()
    except ConfigError as error:
        return failure("self-check", error)
    return Row("self-check", "a tiny model's losses are right, in training and decoding")


def check_gpus() -> Row:
    """Having no GPU is fine, as the run then uses the CPU; a GPU that torch cannot see is a failure."""
    smi = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = smi.splitlines()[0] if smi else None
    if get_accelerator().device_name() != "cuda":
        if driver is None or os.environ.get("DS_ACCELERATOR") == "cpu":
            return Row("GPUs", f"none; the run uses the CPU (cores: {os.cpu_count()}), enough for a trial")
        return Row(
            "GPUs",
            f"torch sees no GPU, but nvidia-smi reports driver {driver}",
            "fail",
            "install a CUDA build of torch, or request GPUs from SLURM (--gpus-per-node)",
        )
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = sorted({f"{each.name} {each.total_memory / GIB:.0f} GiB" for each in properties})
    return Row("GPUs", f"{len(properties)} x {', '.join(names)}, driver {driver or 'unknown'}")


def check_folder(what: str, folder: Path) -> Row:
    """Free space in a folder or, before it exists, in its nearest existing parent.

    It also writes a file there: the number of free bytes does not include quotas.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    choose = f"set {what} to a writable folder with enough space"
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Row(what, f"cannot be written: {error.strerror} ({existing})", "fail", choose)
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free ({folder})"
    if free < MIN_FREE_BYTES[what]:
        needed = f"{MIN_FREE_BYTES[what] / GIB:.0f} GiB should be free"
        return Row(what, found, "warn", f"{needed}: delete some files, or {choose}")
    kind = _output("stat", "--file-system", "--format=%T", str(existing))
    if what == "TMPDIR" and kind and kind.startswith(NETWORK_FILE_SYSTEMS):
        return Row(what, f"{found}, on {kind}", "warn", "set TMPDIR to a node-local disk, which is faster")
    return Row(what, found)


def check_socket_path() -> Row:
    """Data workers pass their batches on through sockets in TMPDIR, whose paths the system limits."""
    try:
        check_temporary_folder()
    except ConfigError as error:
        return failure("TMPDIR's path", error)
    return Row("TMPDIR's path", "short enough for the sockets of data workers")


def check_shared_memory(data: DataConfig | None) -> Row:
    """Data loader workers pass their batches through /dev/shm, and crash with a bus error when it is full."""
    free = shutil.disk_usage("/dev/shm").free
    workers = f" (data.num_workers={data.num_workers} per rank)" if data else ""
    found = f"{free / GIB:.2f} GiB free{workers}"
    if free < MIN_SHM_BYTES and (data is None or data.num_workers):
        return Row("/dev/shm", found, "warn", "enlarge it (container: --shm-size=8g), or set data.num_workers=0")
    return Row("/dev/shm", found)


def check_open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} open files (soft limit; hard limit {hard})"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        limit = min(hard, 65536) if hard >= 0 else 65536
        remedy = f"run `ulimit -n {limit}` before the start: data loader workers pass tensors as open files"
        return Row("ulimit -n", found, "warn", remedy)
    return Row("ulimit -n", found)


def check_orphans() -> Row:
    """Ranks whose launcher has died: a signal kills DeepSpeed's runner but not its ranks."""
    orphans = [pid for pid, parent, arguments in processes() if parent == 1 and is_rank(arguments)]
    if orphans:
        pids = " ".join(map(str, orphans))
        return Row(
            "orphaned ranks",
            f"the launcher of these processes has died: {pids}",
            "warn",
            f"if you do not need them: kill {pids}; start runs with `mirage-launch local`",
        )
    return Row(
        "orphaned ranks",
        "none (a signal that kills plain `deepspeed` orphans its ranks; `mirage-launch local` ends them)",
    )


def processes() -> Iterator[tuple[int, int, list[str]]]:
    """(pid, parent's pid, command line) of each visible process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_text(errors="replace").split("\0")
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:  # it has just ended
            continue
        if parent:
            yield int(folder.name), int(parent[1]), arguments


def is_rank(arguments: list[str]) -> bool:
    """Whether a process is a trainer or DeepSpeed's launcher of one node's trainers. DeepSpeed's runner is neither."""
    module = arguments[arguments.index("-m") + 1 :] if "-m" in arguments else []
    return "mirage_ds.train" in module and module[0] in ("mirage_ds.train", "deepspeed.launcher.launch")


def check_slurm() -> Row:
    if shutil.which("sinfo") is None:
        return Row("SLURM", "not installed; start runs on this machine with `mirage-launch local`")
    try:
        command = ["sinfo", "--noheader", "--format=%P (nodes: %D, %a)"]
        result = ask(*command, check=False, timeout_s=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        remedy = "slurmctld may be down: contact the cluster's administrators"
        return Row("SLURM", f"no answer in {COMMAND_TIMEOUT_S} s", "warn", remedy)
    if result.returncode:
        reason = " ".join(result.stderr.split())
        return Row("SLURM", f"sinfo failed: {reason}", "warn", "log in to a node of the cluster, or start slurmctld")
    return Row("SLURM", "; ".join(result.stdout.splitlines()))


def check_munge() -> Row:
    """Encodes and decodes a credential; SLURM rejects every request of a node where this fails."""
    if shutil.which("munge") is None or shutil.which("unmunge") is None:
        return Row("MUNGE", "not installed; only SLURM needs it")
    # SLURM may use a munged of its own
    named = re.search(r"^AuthInfo\s*=.*?\bsocket=([^,\s]+)", _output("scontrol", "show", "config") or "", re.MULTILINE)
    socket = [f"--socket={named[1]}"] if named else []
    try:
        encoded = subprocess.run(
            ["munge", "--no-input", *socket], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
        decoded = subprocess.run(
            ["unmunge", *socket], input=encoded.stdout, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        remedy = "munged hangs: contact the cluster's administrators"
        return Row("MUNGE", f"no answer in {COMMAND_TIMEOUT_S} s", "warn", remedy)
    if encoded.returncode or decoded.returncode:
        reason = " ".join((encoded.stderr or decoded.stderr).split())
        remedy = "on a node of a cluster, start munged and compare the clocks; elsewhere, ignore this"
        return Row("MUNGE", f"cannot encode and decode a credential: {reason}", "warn", remedy)
    return Row("MUNGE", "encodes and decodes credentials")


def _output(*command: str) -> str | None:
    """The stdout of a command; None if it is not installed, fails or times out."""
    try:
        return ask(*command, timeout_s=COMMAND_TIMEOUT_S).stdout
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
