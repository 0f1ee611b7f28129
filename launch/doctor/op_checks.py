"""Checks of the ops that DeepSpeed compiles at run time: stale lock files, and what compiling them needs."""

import os
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils import cpp_extension

from launch.doctor.findings import Row

# (DeepSpeed's key of an offload, its device) -> the op that the first run compiles.
OFFLOAD_OPS = {("offload_optimizer", "cpu"): "CPUAdamBuilder"} | {
    (key, "nvme"): "AsyncIOBuilder" for key in ("offload_optimizer", "offload_param")
}


def check_locks() -> Iterator[Row]:
    """torch compiles DeepSpeed's ops under a lock file; a build that is killed leaves the file behind."""
    try:
        # torch's own build folder; the call creates it, as any build would
        root = Path(cpp_extension._get_build_directory("probe", verbose=False)).parent
        (root / "probe").rmdir()
    except OSError as error:
        yield Row(
            "torch extensions",
            f"cannot write to the folder for compiled ops: {error}",
            "fail",
            "set TORCH_EXTENSIONS_DIR to a writable folder, preferably on a node-local disk",
        )
        return
    locks = sorted(root.glob("*/lock"))
    for lock in locks:
        age_min = (time.time() - lock.stat().st_mtime) / 60
        yield Row(
            "torch extensions",
            f"{lock.parent.name} has been locked for {age_min:.0f} min ({lock}): a run that needs this op hangs "
            "silently",
            "fail",
            f"if no run is compiling it now, delete the lock: rm {lock}",
        )
    if not locks:
        yield Row("torch extensions", f"no stale lock in {root}")


def check_ops(deepspeed_config: dict[str, Any]) -> Iterator[Row]:
    """The ops that the recipe's offload needs: installed, compiled, or possible to compile here."""
    zero = deepspeed_config["zero_optimization"]
    needed = {builder for (key, device), builder in OFFLOAD_OPS.items() if zero.get(key, {}).get("device") == device}
    for builder in sorted(needed):
        yield check_op(builder)
    if not needed:
        yield Row("DeepSpeed ops", "the recipe needs none")


def check_op(builder_name: str) -> Row:
    builder = get_accelerator().create_op_builder(builder_name)
    what = f"DeepSpeed {builder.name}"
    if installed_ops.get(builder.name):
        return Row(what, "installed with DeepSpeed")
    missing = missing_for_compiling()
    if not builder.is_compatible(verbose=False):
        missing.append(builder.error_log or "a requirement of DeepSpeed's builder (see ds_report)")
    if missing:
        remedy = (
            "install them (apt-get install g++ python3-dev; pip install ninja), or set distributed.deepspeed_config to "
            "a file without offload"
        )
        return Row(what, f"cannot be compiled; missing: {', '.join(missing)}", "fail", remedy)
    built = Path(cpp_extension._get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"
    if built.is_file():
        return Row(what, f"compiled ({built})")
    return Row(what, "not compiled yet; the first run compiles it, which takes a minute or two")


def missing_for_compiling() -> list[str]:
    """What torch needs to compile an op and cannot find."""
    found = {
        "g++": shutil.which(os.environ.get("CXX", "g++")),
        "ninja": cpp_extension.is_ninja_available(),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        "the CUDA toolkit (CUDA_HOME)": cpp_extension.CUDA_HOME or not torch.cuda.is_available(),
    }
    return [name for name, present in found.items() if not present]
