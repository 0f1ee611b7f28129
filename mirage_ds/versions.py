"""Which versions run, and whether they were tested. Imports neither torch nor transformers: it is called before them.

docs/versions.md lists what was tested. setup.cfg owns the oldest of these versions, which a package's own metadata
repeats: older ones are refused, and so are those known to be wrong. A newer one than NEWEST_TESTED runs after a line of
warning; self_check.py, at every start, compares what it computes.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mirage_ds.errors import ConfigError, MirageError, leave
from mirage_ds.programs import ask

TESTED = ("torch", "deepspeed", "transformers")  # they decide a run's numbers
NEWEST_TESTED = {"torch": Version("2.14.1"), "deepspeed": Version("0.19.8"), "transformers": Version("5.24.0")}
# Versions that raise no error and compute something else, and what.
KNOWN_BAD = {
    # Measured (docs/results.md) and fixed in 0.19.8: https://github.com/deepspeedai/DeepSpeed/pull/8539
    "deepspeed": {"<0.19.8": "uses weights before they are gathered, on CPU ranks"},
    "transformers": {">=5.3,<5.5.4": "gives images wrong positions"},
}
REMEDY = "install tested versions with pip install -c constraints.txt -e ."


def versions() -> dict[str, str]:
    """Versions of the packages, and the commit of the code, marked if there are uncommitted changes."""
    packages = {name: version(name) for name in ("mirage_ds", *TESTED)}
    submitted = Path(__file__).parents[1] / "commit"  # `mirage-launch slurm` wrote it beside its copy of the packages
    if submitted.is_file():
        return packages | {"git_commit": submitted.read_text().strip()}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = ask(*command).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git here, or no checkout
        commit = "unknown"
    return packages | {"git_commit": commit}


def tested_ranges() -> dict[str, SpecifierSet]:
    """The versions of each package of TESTED that are not too old.

    Raises:
        ConfigError: mirage_ds itself is not installed.
    """
    try:
        required = [Requirement(text) for text in requires("mirage_ds") or []]
    except PackageNotFoundError as error:
        raise ConfigError(
            "mirage_ds is not installed (in this Python), so its tested versions are unknown; install the checkout "
            "with pip install -c constraints.txt -e ."
        ) from error
    return {requirement.name: requirement.specifier for requirement in required if requirement.name in TESTED}


def check_versions() -> None:
    """Refuses versions that are older than the tested ones, and those that are known to compute something else.

    Raises:
        ConfigError: it names each of them.
    """
    wrong = [reason for name, tested in tested_ranges().items() if (reason := unsuitable(name, tested))]
    if wrong:
        raise ConfigError(
            f"unsuitable versions are installed ({sys.prefix}): {'; '.join(wrong)}; allowed are the tested versions, "
            f"which docs/versions.md lists, and newer ones; {REMEDY}"
        )


def unsuitable(name: str, tested: SpecifierSet) -> str | None:
    """Why the installed version of a package is refused."""
    installed = version(name)
    for bad, reason in KNOWN_BAD.get(name, {}).items():
        if SpecifierSet(bad).contains(installed, prereleases=True):
            return f"{name} {installed} {reason}, as {bad} does"
    if not tested.contains(installed, prereleases=True):
        return f"{name} is {installed}, tested is {tested}"
    return None


def newer_than_tested() -> str | None:
    """Which installed packages are newer than anything that was tested, as a sentence."""
    newer = [
        f"{name} {version(name)} (tested up to {tested})"
        for name, tested in NEWEST_TESTED.items()
        if Version(Version(version(name)).public) > tested  # a local label (+cu130) does not count
    ]
    return f"newer than what was tested: {', '.join(newer)}" if newer else None


def warn_if_newer() -> None:
    """Says so in one line, on the first rank."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" and (newer := newer_than_tested()):
        print(
            f"warning: {newer}; the self-check at the start compares what torch and transformers compute, but nothing "
            f"that DeepSpeed shards; if in doubt, {REMEDY}",
            file=sys.stderr,
            flush=True,
        )


def leave_if_unsuitable() -> None:
    """For the first lines of a program, before imports that another version may lack: refuses, or warns."""
    try:
        check_versions()
    except MirageError as error:
        leave(error)
    warn_if_newer()
