"""Versions that are too old or known to be wrong are refused before anything of them is imported; newer ones warn."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

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


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda package: installed.get(package) or real(package))


@pytest.mark.parametrize(
    ("name", "other", "reason"),
    [
        ("transformers", "5.5.2", "gives images wrong positions"),
        ("transformers", "5.3.0", "gives images wrong positions"),
        ("transformers", "4.57.1", "tested is "),
        ("deepspeed", "0.19.7", "uses weights before they are gathered"),
        ("torch", "2.8.0+cu128", "tested is "),
    ],
)
def test_unsuitable_ones_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, other: str, reason: str
) -> None:
    pretend(monkeypatch, **{name: other})
    with pytest.raises(ConfigError) as error:
        versions.check_versions()
    message = str(error.value)
    assert re.search(rf"{name} (is )?{re.escape(other)},? {reason}", message)
    assert not [package for package in versions.TESTED if package != name and f"{package} " in message]
    assert "pip install -c constraints.txt" in message


def test_known_bad_ones_are_no_tested_ones() -> None:
    """pip does not install them either."""
    for name, bad in versions.KNOWN_BAD.items():
        for text in bad:
            (end,) = [clause.version for clause in SpecifierSet(text) if clause.operator == "<"]
            (oldest,) = [clause.version for clause in versions.tested_ranges()[name] if clause.operator == ">="]
            assert Version(end) <= Version(oldest)


def test_a_newer_one_is_one_line_of_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, transformers="5.99.0", torch="2.99.0.dev20270101+cu130")
    versions.check_versions()
    versions.warn_if_newer()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: newer than what was tested: torch 2\.99\S* \(tested up to 2\.\S+\), transf", line)
    monkeypatch.setenv("RANK", "3")
    versions.warn_if_newer()
    assert not capsys.readouterr().err


def test_a_local_build_of_a_tested_version_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, **{name: f"{tested}+cu130" for name, tested in versions.NEWEST_TESTED.items()})
    versions.check_versions()
    versions.warn_if_newer()
    assert not capsys.readouterr().err


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
    assert result.stderr.startswith("error: unsuitable versions are installed")
    assert "transformers 5.5.2 gives images wrong positions" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "cwd").iterdir())
