"""Set-up that several folders share, and how the tests are divided over pytest-xdist's workers.

`make test` runs several files at a time; the tests of a file stay in one worker. Those that take longest come first.
"""

import os
import signal
from pathlib import Path

import pytest

pytest.register_assert_rewrite("deviations")

import deviations  # noqa: E402
import hypothesis  # noqa: E402
from main_job import main_job  # noqa: E402

# On a busy machine an example may take longer than the default deadline.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# Under nohup: tests ignore SIGHUP as before, but what they start must not, as it would not in a terminal.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
# In the background of a script: SIGINT is ignored there, and would be in what tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The slowest first: SLURM, which waits most of the time, then files that train a lot. All others follow. The first test
# of SLURM runs the README's main job, to compare with; what else needs it comes late enough not to wait.
FIRST = (
    "tests/cluster/",
    "tests/distributed/test_sharding.py",
    "tests/distributed/test_resume.py",
    "tests/unit/ops/test_interpreted.py",
    "tests/distributed/",
    "tests/docs/test_blocks.py",
    "tests/unit/launch/test_local.py",
)


def place(item: pytest.Item) -> int:
    """Where in the order a test runs; among equals, as they were."""
    return next((number for number, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    import groups  # here, as pytest-xdist is needed for several workers only

    return groups.Groups(config, log)


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
