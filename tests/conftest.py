"""Set-up that several folders share, and how the tests are divided over pytest-xdist's workers.

`make test` runs several files at a time; the tests of a file stay in one worker. Those that take longest come first.
"""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("deviations")

import deviations  # noqa: E402
from main_job import main_job  # noqa: E402

HERE = Path(__file__).parent
FIRST = (
    "cluster",  # the slowest by far; one SLURM at a time, and most of its time is waiting
    "distributed/test_sharding.py",
    "distributed/test_resume.py",
    "docs/test_blocks.py",
    "unit/ops/test_interpreted.py",
    "distributed",
)


def place(path: Path) -> tuple[int, str]:
    """Where in the order a file's tests run, and the group that runs them."""
    name = path.relative_to(HERE).as_posix()
    name = "cluster" if name.startswith("cluster/") else name
    order = [number for number, first in enumerate(FIRST) if name.startswith(first)]
    return (order or [len(FIRST)])[0], name


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item: place(item.path) for item in items}
    items.sort(key=lambda item: places[item][0])  # a stable sort: else as they were
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(places[item][1]))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of xdist's workers see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def drawn_job(shared: Path) -> Path:
    """The folder in which the README's main job ran, on rows that are drawn."""
    return main_job(shared, drawn=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its comparisons to the process that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deviations"] = deviations.as_lists()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """A worker has ended; one that crashed has no output."""
    deviations.merge(getattr(node, "workeroutput", {}).get("deviations", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After tests that compared numbers with the reference's: each quantity, its tolerance and the worst deviation."""
    if deviations.seen:
        terminalreporter.section("parity with the reference implementation")
        for line in deviations.table():
            terminalreporter.write_line(line)
