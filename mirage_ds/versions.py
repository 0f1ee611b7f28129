"""Which versions run, and whether they were tested. Imports neither torch nor transformers: it is called before them.

setup.cfg owns the ranges; a package's own metadata repeats them.
"""

import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mirage_ds.errors import ConfigError, MirageError, leave

TESTED = ("torch", "deepspeed", "transformers")  # they decide a run's numbers


def versions() -> dict[str, str]:
    """Versions of the packages, and the commit of the code, marked if there are uncommitted changes."""
    packages = {name: version(name) for name in ("mirage_ds", *TESTED)}
    submitted = Path(__file__).parents[1] / "commit"  # `mirage-launch slurm` wrote it beside its copy of the packages
    if submitted.is_file():
        return packages | {"git_commit": submitted.read_text().strip()}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git here, or no checkout
        commit = "unknown"
    return packages | {"git_commit": commit}


def tested_ranges() -> dict[str, SpecifierSet]:
    """The tested versions of each package of TESTED.

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
    """Refuses untested versions: they may silently compute other numbers.

    Raises:
        ConfigError: it names each of them.
    """
    wrong = [
        f"{name} is {version(name)}, tested is {tested}"
        for name, tested in tested_ranges().items()
        if not tested.contains(version(name), prereleases=True)
    ]
    if wrong:
        raise ConfigError(
            f"untested versions are installed ({'; '.join(wrong)}); they may silently compute other numbers, as "
            "transformers 5.3.0 to 5.5.3 do, which give images wrong positions; install the tested versions with pip "
            "install -c constraints.txt -e ."
        )


def leave_if_untested() -> None:
    """`check_versions` for the first lines of a program, before imports that another version may lack."""
    try:
        check_versions()
    except MirageError as error:
        leave(error)
