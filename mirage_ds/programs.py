"""Other programs are asked in an environment that does not change their answer, and ranks start in a clean one."""

import os
import subprocess
from collections.abc import Mapping

# They change formats, order, filters and language of what SLURM's commands and git print.
PREFIXES = ("SQUEUE_", "SINFO_", "SCONTROL_", "SACCT_", "LC_", "GIT_TRACE")
NAMES = (
    *("SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "LANG", "LANGUAGE", "COLUMNS"),
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE"),
)


def plain_environment() -> dict[str, str]:
    """The variables for a program whose output is read: this process's, without those that change the output."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith(PREFIXES)}
    return kept | {"LC_ALL": "C"}


def ask(
    *command: str, check: bool = True, timeout_s: float | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program whose output is read, as text.

    Args:
        check: raise CalledProcessError if it fails.
        environment: None: a plain one.
    """
    chosen = plain_environment() if environment is None else environment
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=timeout_s, env=chosen)


def without_current_folder(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for a Python program that must not import from the current folder: a user's statistics.py there
    would replace Python's own. An empty entry of PYTHONPATH, as in `:/a`, also means that folder."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    rest = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return rest | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
