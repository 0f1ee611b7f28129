"""The matrix of versions, with commands that are not run: what is stored, what is run again, and the page."""

import configparser
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import matrix
import pytest
import version_page
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mirage_ds import versions

PINNED = replace(matrix.pinned(), python=f"{sys.version_info[0]}.{sys.version_info[1]}")
OTHER = replace(PINNED, transformers="5.1.0")
PASSED = '<testcase name="a" />'
FAILED = """<testcase name="b[0]"><failure message="x">def b():
&gt; check()
E   ValueError: 2 | 3
E   more</failure></testcase>"""


def suite(*cases: str) -> str:
    return f'<testsuites><testsuite tests="{len(cases)}">{"".join(cases)}</testsuite></testsuites>'


class Commands:
    """Takes the commands of cells, and answers as if all of them succeeded, but for those that `answers` names."""

    def __init__(self, **answers: tuple[int, str]) -> None:
        self.answers, self.given = answers, []

    def start(self, log: Path) -> matrix.Run:
        self.given.append(log.stem)
        return self.run

    def run(self, command: list[str]) -> tuple[int, str]:
        self.given.append(kind := self.kind(command))
        code, answer = self.answers.get(kind, (0, ""))
        if kind in ("parity", "decoding"):
            report = next(word for word in command if word.startswith("--junitxml")).partition("=")[2]
            if code >= 0:
                Path(report).write_text(answer or suite(PASSED, PASSED))
        elif kind == "losses" and code == 0:
            folder = Path(command[3])
            folder.mkdir()
            (folder / "losses.json").write_text(answer or json.dumps({"text": [2.0, 1.0]}))
        elif kind == "list":
            return code, json.dumps({"python": "3.99.1", "torch": "2.13.0+cpu"})
        return code, answer

    def kind(self, command: list[str]) -> str:
        text = " ".join(command)
        kinds = {"venv": "venv", "--editable": "package", "--constraint": "install", "junitxml": "tests"}
        kinds |= {"smoke.py": "losses", "git rev-parse": "commit", "importlib": "list"}
        found = next(kind for part, kind in kinds.items() if part in text)
        return "decoding" if "test_generate.py" in text else "parity" if found == "tests" else found


ALL = ["venv", "install", "package", "list", "parity", "decoding", "losses", "commit"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the matrix of the two cells; returns the page."""
    monkeypatch.setattr(matrix, "pinned", lambda: PINNED)
    monkeypatch.setattr(matrix.shutil, "which", lambda name: f"/bin/{name}")

    def action(commands: Commands, cells: tuple[matrix.Cell, ...] = (PINNED, OTHER)) -> str:
        matrix.run_matrix(list(cells), tmp_path / "results", tmp_path / "page.md", commands.start)
        return (tmp_path / "page.md").read_text()

    return action


def failures(page: str) -> list[str]:
    return page.partition("## What failed\n")[2].split("\n\n")[0].strip().splitlines()


def test_a_finished_cell_is_not_run_again(run, tmp_path: Path) -> None:
    first, second, third = Commands(), Commands(), Commands()
    run(first, (PINNED,))
    assert first.given == [PINNED.name, *ALL]
    page = run(second)
    assert second.given == [OTHER.name, *ALL]
    (tmp_path / "page.md").unlink()
    assert run(third) == page
    assert third.given == []
    (tmp_path / "results" / f"{PINNED.name}.json").unlink()
    run(third)
    assert third.given == [PINNED.name, *ALL]


def test_an_interrupted_cell_is_run_again(run) -> None:
    class Interrupted(Commands):
        def run(self, command: list[str]) -> tuple[int, str]:
            if self.kind(command) == "decoding":
                raise KeyboardInterrupt
            return super().run(command)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())
    commands = Commands()
    run(commands)
    assert commands.given == [PINNED.name, *ALL, OTHER.name, *ALL]


def test_the_page_of_cells_that_passed(run) -> None:
    page = run(Commands())
    rows = [line for line in page.splitlines() if line.startswith("| 3.99.1")]
    assert len(rows) == 2
    assert f"| 3.99.1 | 2.13.0+cpu | {OTHER.deepspeed} | 5.1.0 |  |  | 2 | 2 | 0.0e+00 | " in rows[1]
    assert failures(page) == ["Nothing."]


@pytest.mark.parametrize(
    ("answers", "failed", "words"),
    [
        ({"parity": (1, suite(PASSED, FAILED))}, "parity", "1 of 2; b[0]: ValueError: 2 | 3"),
        ({"parity": (0, suite(PASSED, '<testcase name="c"><skipped message="no" /></testcase>'))}, "parity", "c: no"),
        ({"decoding": (-11, "Fatal Python error\n")}, "decoding", "exit code -11: Fatal Python error"),
        ({"losses": (1, "E.Error: lost (/tmp/a/x.py) '/b/c.d/y'\nend\n")}, "two ranks", "`E.Error: lost (x.py) 'y'`"),
        ({"losses": (0, '{"text": [2.0, 1.00003]}')}, "two ranks", "deviates by 3.0e-05 of the first row's"),
        ({"losses": (0, '{"text": [2.0, NaN]}')}, "two ranks", "deviates by inf"),
        ({"install": (1, "a\nERROR: no such version\n")}, "parity and decoding and two ranks", "no such version"),
    ],
    ids=str,
)
def test_what_failed_is_on_the_page_with_its_reason(run, answers: dict, failed: str, words: str) -> None:
    run(Commands(), (PINNED,))
    page = run(Commands(**answers))
    (line,) = failures(page)
    assert line.startswith(f"- {version_page.describe(vars(OTHER))}; {failed}: ")
    assert words in line
    assert page.count("**failed**") == len(failed.split(" and "))


def test_what_has_not_run_is_on_the_page(run, tmp_path: Path) -> None:
    class Stopped(Commands):
        def start(self, log: Path) -> matrix.Run:
            if log.stem == OTHER.name:
                raise KeyboardInterrupt
            return super().start(log)

    with pytest.raises(KeyboardInterrupt):
        run(Stopped())
    title = "## What has not run yet"
    assert (tmp_path / "page.md").read_text().endswith(f"{title}\n\n- {version_page.describe(vars(OTHER))}\n")
    assert title not in run(Commands())


def test_small_differences_pass(run) -> None:
    run(Commands(), (PINNED,))
    page = run(Commands(losses=(0, '{"text": [2.00001, 1.0]}')))
    assert "| 2 | 2 | 5.0e-06 |" in page
    assert failures(page) == ["Nothing."]


def test_a_missing_interpreter_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=f"no Python {PINNED.python}.*PATH"):
        run(Commands())


def test_a_command_that_hangs_fails_and_leaves_nothing(tmp_path: Path) -> None:
    run = matrix.runner(tmp_path / "log", dict(os.environ), timeout_s=1)
    code, output = run(["bash", "-c", "echo first; sleep 60 & echo $! > " + str(tmp_path / "pid") + "; wait"])
    assert (code, output) == (matrix.TIMEOUT_CODE, "first\nerror: not finished after 1 s\n")
    assert "first\nerror" in (tmp_path / "log").read_text()
    killed = Path("/proc") / (tmp_path / "pid").read_text().strip()
    for _ in range(100):  # until the system has removed it
        if killed.exists():
            time.sleep(0.1)
    assert not killed.exists()
    assert run(["bash", "-c", "echo second; exit 3"]) == (3, "second\n")


def test_what_is_installed(tmp_path: Path) -> None:
    """The cell's versions; the other pins, but for packages whose versions follow from the cell's."""
    arguments = matrix.requirements(OTHER, tmp_path / "constraints.txt")
    pins = (tmp_path / "constraints.txt").read_text().splitlines()
    names = {matrix.package_name(pin) for pin in pins}
    assert {"numpy", "safetensors", "pillow"} <= names
    assert not names & {*matrix.VARIED, *matrix.FOLLOW}
    assert {"transformers==5.1.0", f"torch=={PINNED.torch}", "pyyaml>=6", "pytest"} <= set(arguments)
    assert not [word for word in arguments if word.startswith(("#", "tokenizers"))]


def test_the_matrix_has_no_cell_twice() -> None:
    cells = matrix.cells()
    assert len(set(cells)) == len(cells)
    assert cells[0] == matrix.pinned()


def page_rows() -> list[list[str]]:
    table = (matrix.ROOT / "docs" / "versions.md").read_text().split("\n## Results\n")[1]
    return [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \d", line)]


def test_setup_cfg_follows_the_page() -> None:
    """It accepts each row of docs/versions.md in which everything passed, and no other."""
    setup = configparser.ConfigParser()
    setup.read(matrix.ROOT / "setup.cfg")
    required = {
        matrix.package_name(line): line[len(matrix.package_name(line)) :]
        for line in setup["options"]["install_requires"].split("\n")
    }
    ranges = {name: SpecifierSet(required.get(name, "")) for name in ("torch", "deepspeed", "transformers")}
    ranges = {"python": SpecifierSet(setup["options"]["python_requires"])} | ranges
    assert page_rows()
    for row in page_rows():
        accepted = all(limits.contains(version) for limits, version in zip(ranges.values(), row, strict=False))
        assert accepted == ("**failed**" not in row), row


def test_the_newest_versions_without_a_warning_are_the_pages() -> None:
    passed = [row for row in page_rows() if "**failed**" not in row]
    for column, name in enumerate(("torch", "deepspeed", "transformers"), start=1):
        newest = max(Version(Version(row[column]).public) for row in passed)
        assert newest == versions.NEWEST_TESTED[name]


def test_the_page_has_every_cell_once() -> None:
    page = (matrix.ROOT / "docs" / "versions.md").read_text()
    rows = [tuple(Version(version).public for version in row[:4]) for row in page_rows()]
    for cell in matrix.cells():
        wanted = (cell.torch, cell.deepspeed, cell.transformers)
        run = [row for row in rows if row[0].startswith(f"{cell.python}.") and row[1:] == wanted]
        waiting = f"- {version_page.describe(vars(cell))}\n" in page
        assert len(run) + waiting == 1, cell
    assert len(rows) <= len(matrix.cells())
