"""What one node has of what a run needs: each check is a function that returns one row, or one for each thing it found.

A check names the errors that it expects; they make a row. Anything else is a bug and keeps its traceback.
"""

import os
import re
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from launch.doctor.findings import Row, failure
from mirage_ds.config import Config, DataConfig
from mirage_ds.data.index import load_index
from mirage_ds.data.shard_samples import parse_members, read_range
from mirage_ds.data.shards import ShardFolder, load_manifest, read_manifest
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.model.backbone import DTYPES, check_config, choose_attention
from mirage_ds.ops.latent_pool import describe_path
from mirage_ds.versions import versions

GIB = 2**30
SAMPLES_READ = 8  # of each folder of shards, evenly from its index
PROBE_BYTES = 2**20  # written to a folder to see that it takes them
MIN_FREE_BYTES = {"run.dir": 10 * GIB, "TMPDIR": GIB}
MIN_SHM_BYTES = GIB  # docker gives 64 MiB, of which two workers' batches of images fill the most
MIN_OPEN_FILES = 1024
COMMAND_TIMEOUT_S = 30
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "smb", "wekafs", "panfs")
# DeepSpeed's key of an offload, its device -> the op that it compiles at the first start.
OFFLOAD_OPS = {("offload_optimizer", "cpu"): "CPUAdamBuilder"} | {
    (key, "nvme"): "AsyncIOBuilder" for key in ("offload_optimizer", "offload_param")
}


def check_node(config: Config | None, deepspeed_config: dict[str, Any]) -> Iterator[Row]:
    """All checks of this node; those of a recipe only with one."""
    yield check_packages()
    yield check_gpus()
    yield from check_locks()
    if config is not None:
        yield from check_ops(deepspeed_config)
        yield check_attention(config)
        yield check_kernels()
        yield check_model(config)
        yield from check_shards(config)
        yield check_folder("run.dir", config.run.dir)
    yield check_folder("TMPDIR", Path(os.environ.get("TMPDIR", "/tmp")))
    yield check_shared_memory(config.data if config else None)
    yield check_open_files()
    yield check_leftovers()
    yield check_slurm()
    yield check_munge()


def facts(config: Config | None) -> dict[str, str]:
    """What must be the same on every node."""
    found = versions()
    if config is not None:
        try:
            found["data.shards"] = read_manifest(config.data.shards).digest
        except DataError as error:
            found["data.shards"] = failure("data.shards", error).found
    return found


def check_packages() -> Row:
    """Those that decide a run's numbers; doctor.py has found that they are tested ones."""
    return Row("versions", ", ".join(f"{name} {version:.12}" for name, version in versions().items()))


def check_gpus() -> Row:
    """None is fine: the CPU is used then. A GPU that torch cannot see is not."""
    smi = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = smi.splitlines()[0] if smi else None
    if get_accelerator().device_name() != "cuda":
        if driver is None or os.environ.get("DS_ACCELERATOR") == "cpu":
            return Row("GPUs", f"none: the run computes on {os.cpu_count()} CPU cores, which is enough for a trial")
        return Row(
            "GPUs",
            f"torch sees none, though nvidia-smi finds driver {driver}",
            "fail",
            "install the torch built for CUDA, or ask SLURM for GPUs (--gpus-per-node)",
        )
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = sorted({f"{each.name} {each.total_memory / GIB:.0f} GiB" for each in properties})
    return Row("GPUs", f"{len(properties)} x {', '.join(names)}, driver {driver or 'unknown'}")


def check_locks() -> Iterator[Row]:
    """What DeepSpeed compiles, torch builds under a lock file; a build that was killed leaves it there for ever."""
    try:
        # torch's own answer to where it builds; it also makes the folder, as any build would
        root = Path(cpp_extension._get_build_directory("probe", verbose=False)).parent
        (root / "probe").rmdir()
    except OSError as error:
        yield Row(
            "torch extensions",
            f"the folder for compiled ops cannot be written: {error}",
            "fail",
            "set TORCH_EXTENSIONS_DIR to a folder of yours, best on a node-local disk",
        )
        return
    locks = sorted(root.glob("*/lock"))
    for lock in locks:
        age_min = (time.time() - lock.stat().st_mtime) / 60
        yield Row(
            "torch extensions",
            f"{lock.parent.name} is locked since {age_min:.0f} minutes ({lock}): a run that needs this op waits for "
            "ever, without a word",
            "fail",
            f"if no run is compiling it right now, delete it: rm {lock}",
        )
    if not locks:
        yield Row("torch extensions", f"no stale lock in {root}")


def check_ops(deepspeed_config: dict[str, Any]) -> Iterator[Row]:
    """The DeepSpeed ops that the recipe's offload needs: there already, or can be compiled here."""
    zero = deepspeed_config["zero_optimization"]
    needed = {builder for (key, device), builder in OFFLOAD_OPS.items() if zero.get(key, {}).get("device") == device}
    for builder in sorted(needed):
        yield check_op(builder)
    if not needed:
        yield Row("DeepSpeed ops", "the recipe needs none that must be compiled")


def check_op(builder_name: str) -> Row:
    builder = get_accelerator().create_op_builder(builder_name)
    what = f"DeepSpeed {builder.name}"
    if installed_ops.get(builder.name):
        return Row(what, "installed with DeepSpeed")
    missing = missing_for_compiling()
    if not builder.is_compatible(verbose=False):
        missing.append(builder.error_log or "what DeepSpeed's builder asks for (see ds_report)")
    if missing:
        remedy = "install them (apt-get install g++ python3-dev; pip install ninja), or choose a file without offload"
        return Row(what, f"cannot be compiled: missing is {', '.join(missing)}", "fail", remedy)
    built = Path(cpp_extension._get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"
    if built.is_file():
        return Row(what, f"compiled ({built})")
    return Row(what, "not compiled yet; the first start does it, which takes a minute or two")


def missing_for_compiling() -> list[str]:
    """What torch needs to compile an op and is not there."""
    found = {
        "g++": shutil.which(os.environ.get("CXX", "g++")),
        "ninja": cpp_extension.is_ninja_available(),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        "the CUDA toolkit (CUDA_HOME)": cpp_extension.CUDA_HOME or not torch.cuda.is_available(),
    }
    return [name for name, there in found.items() if not there]


def check_attention(config: Config) -> Row:
    try:
        chosen = choose_attention(config.model.attention, DTYPES[config.train.dtype])
    except ConfigError as error:
        return failure("attention", error)
    if chosen == "sdpa" and config.model.attention == "auto" and torch.cuda.is_available():
        reason = "flash-attn is not installed" if config.train.dtype == "bf16" else "train.dtype is fp32"
        return Row("attention", f"sdpa: {reason}")
    return Row("attention", chosen)


def check_kernels() -> Row:
    try:
        return Row("kernels", describe_path(torch.device(get_accelerator().current_device_name())))
    except ConfigError as error:
        return failure("kernels", error)


def check_model(config: Config) -> Row:
    try:
        check_config(config.model.path, config.model.cache_dir)
    except ConfigError as error:
        return failure("model", error)
    return Row("model", config.model.path)


def check_shards(config: Config) -> Iterator[Row]:
    """The manifest, the size of every shard, and some samples whole."""
    for what, folder in (("data.shards", config.data.shards), ("evaluation.shards", config.evaluation.shards)):
        if folder is None:
            continue
        try:
            shards = load_manifest(folder)
            num_bytes = read_some(shards)
        except DataError as error:
            yield failure(what, error)
            continue
        yield Row(
            what,
            f"{shards.num_samples} samples in {len(shards.manifest.shards)} shards ({folder}), digest "
            f"{shards.digest:.12}; some read, {num_bytes} bytes",
        )


def read_some(shards: ShardFolder) -> int:
    """Reads SAMPLES_READ samples as the trainer does; returns their bytes.

    Raises:
        DataError: one cannot be read.
    """
    index = load_index(shards)
    some = index[:: -(-len(index) // SAMPLES_READ)]
    for entry in some:
        name = shards.manifest.shards[entry.shard].name
        where = f"{name}/{entry.key}"
        parse_members(read_range(shards.path / name, entry.offset, entry.size, where), entry.key, where)
    return sum(entry.size for entry in some)


def check_folder(what: str, folder: Path) -> Row:
    """Room in a folder, or where it will be made; a byte count alone knows nothing of quotas, so it is written to."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    choose = f"set {what} to a folder with room where you may write"
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Row(what, f"cannot be written: {error.strerror} ({there})", "fail", choose)
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free ({folder})"
    if free < MIN_FREE_BYTES[what]:
        return Row(what, found, "warn", f"{MIN_FREE_BYTES[what] / GIB:.0f} GiB should be free; free some, or {choose}")
    kind = _output("stat", "--file-system", "--format=%T", str(there))
    if what == "TMPDIR" and kind and kind.startswith(NETWORK_FILE_SYSTEMS):
        return Row(what, f"{found}, on {kind}", "warn", "set TMPDIR to a node-local disk: this one is slow")
    return Row(what, found)


def check_shared_memory(data: DataConfig | None) -> Row:
    """Data loader workers hand their batches over in /dev/shm; where it is full they die of a bus error."""
    free = shutil.disk_usage("/dev/shm").free
    workers = f", for {data.num_workers} data loader workers per rank" if data else ""
    found = f"{free / GIB:.2f} GiB free{workers}"
    if free < MIN_SHM_BYTES and (data is None or data.num_workers):
        return Row("/dev/shm", found, "warn", "give the container more (--shm-size=8g), or set data.num_workers=0")
    return Row("/dev/shm", found)


def check_open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} open files allowed, {hard} at most"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        remedy = f"ulimit -n {min(hard, 65536) if hard >= 0 else 65536} before the start: workers pass tensors as files"
        return Row("ulimit -n", found, "warn", remedy)
    return Row("ulimit -n", found)


def check_leftovers() -> Row:
    """Ranks whose launcher died: DeepSpeed's runner dies of a signal and leaves them computing."""
    left = [pid for pid, parent, words in processes() if parent == 1 and is_rank(words)]
    if left:
        pids = " ".join(map(str, left))
        return Row(
            "launcher",
            f"processes of a run whose launcher is gone: {pids}",
            "warn",
            f"if you do not need them: kill {pids}; start runs with `mirage-launch local`",
        )
    return Row(
        "launcher",
        "no ranks without a launcher. Plain `deepspeed` dies of a signal and leaves its ranks running: "
        "`mirage-launch local` ends them",
    )


def processes() -> Iterator[tuple[int, int, list[str]]]:
    """(pid, parent's pid, command line) of each process that can be seen."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:  # it has just ended
            continue
        if parent:
            yield int(folder.name), int(parent[1]), words


def is_rank(words: list[str]) -> bool:
    """A trainer, or the process of DeepSpeed that starts a node's trainers; the runner itself is neither."""
    module = words[words.index("-m") + 1 :] if "-m" in words else []
    return "mirage_ds.train" in module and module[0] in ("mirage_ds.train", "deepspeed.launcher.launch")


def check_slurm() -> Row:
    if shutil.which("sinfo") is None:
        return Row("SLURM", "not found: this is one machine; `mirage-launch local` starts runs here")
    try:
        command = ["sinfo", "--noheader", "--format=%P %D nodes %a"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Row("SLURM", f"no answer in {COMMAND_TIMEOUT_S} s", "warn", "ask the cluster's staff: slurmctld is down")
    if result.returncode:
        said = " ".join(result.stderr.split())
        return Row("SLURM", f"installed, but: {said}", "warn", "log in to the cluster's head node, or start slurmctld")
    return Row("SLURM", "; ".join(result.stdout.splitlines()))


def check_munge() -> Row:
    """A credential made and taken back; SLURM refuses every request of a node where that fails."""
    if shutil.which("munge") is None or shutil.which("unmunge") is None:
        return Row("MUNGE", "not found here; SLURM alone needs it")
    # SLURM may use a munged of its own
    named = re.search(r"^AuthInfo\s*=.*?\bsocket=([^,\s]+)", _output("scontrol", "show", "config") or "", re.MULTILINE)
    socket = [f"--socket={named[1]}"] if named else []
    try:
        made = subprocess.run(
            ["munge", "--no-input", *socket], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
        taken = subprocess.run(
            ["unmunge", *socket], input=made.stdout, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Row("MUNGE", f"no answer in {COMMAND_TIMEOUT_S} s", "warn", "ask the cluster's staff: munged hangs")
    said = " ".join((made.stderr or taken.stderr).split())
    if made.returncode or taken.returncode:
        remedy = "on a cluster's node: start munged, and compare the clocks; elsewhere nothing needs it"
        return Row("MUNGE", f"makes no credential: {said}", "warn", remedy)
    return Row("MUNGE", "makes credentials and takes them back")


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_TIMEOUT_S).stdout
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
