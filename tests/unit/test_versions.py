"""Versions outside the tested range are refused, before anything of them is imported."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import launching
import pytest

from mirage_ds import versions
from mirage_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_versions_name_what_runs() -> None:
    found = versions.versions()
    assert set(found) == {"mirage_ds", "torch", "deepspeed", "transformers", "git_commit"}
    assert all(found.values())


def test_what_is_installed_here_is_tested() -> None:
    versions.check_versions()


def test_the_ranges_are_those_of_setup_cfg() -> None:
    """An installation that is older than setup.cfg would be held against the wrong ranges; here it must not be."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split("\n")
    for name in versions.TESTED:
        (specifier,) = [line.removeprefix(name) for line in wanted if re.match(rf"{name}\W", line)]
        assert str(versions.tested_ranges()[name]) in (specifier, ",".join(reversed(specifier.split(","))))


@pytest.mark.parametrize(
    ("name", "other", "tested"),
    [
        ("transformers", "5.5.2", "5.23"),
        ("transformers", "5.24.0", "5.23"),
        ("deepspeed", "0.19.9", "0.19.8"),
        ("torch", "2.12.1+cu130", "2.13"),
        ("torch", "2.14.0", "2.13"),
    ],
)
def test_others_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, name: str, other: str, tested: str) -> None:
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda package: other if package == name else real(package))
    with pytest.raises(ConfigError) as error:
        versions.check_versions()
    message = str(error.value)
    assert re.search(rf"{name} is {re.escape(other)}, tested is [^;]*{re.escape(tested)}", message)
    assert message.count("tested is ") == 1  # this package alone
    assert "5.3.0 to 5.5.3" in message
    assert "pip install -c constraints.txt" in message


def test_a_local_build_of_a_tested_version_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.version
    local = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8+abc"}
    monkeypatch.setattr(versions, "version", lambda package: local.get(package) or real(package))
    versions.check_versions()


def test_the_trainer_looks_before_it_imports(tmp_path: Path) -> None:
    """A transformers that cannot even be imported: the user reads of its version, not of that."""
    packages = tmp_path / "packages"
    (packages / "transformers-5.5.2.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: transformers\nVersion: 5.5.2\n"
    (packages / "transformers-5.5.2.dist-info" / "METADATA").write_text(metadata)
    (packages / "transformers.py").write_text("raise ImportError('another version')\n")
    environment = launching.environment()
    environment["PYTHONPATH"] = f"{packages}:{environment['PYTHONPATH']}"
    (tmp_path / "cwd").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "mirage_ds.train", str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")],
        env=environment,
        cwd=tmp_path / "cwd",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: untested versions are installed (transformers is 5.5.2")
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "cwd").iterdir())
