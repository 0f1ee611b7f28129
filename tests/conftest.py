"""Set-up that several folders share."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("deviations")

import deviations  # noqa: E402
from main_job import run_main_job  # noqa: E402


@pytest.fixture(scope="session")
def drawn_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's main job ran, on rows that are drawn."""
    return run_main_job(tmp_path_factory.mktemp("drawn"), drawn=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After tests that compared numbers with the reference's: each quantity, its tolerance and the worst deviation."""
    if deviations.seen:
        terminalreporter.section("parity with the reference implementation")
        for line in deviations.table():
            terminalreporter.write_line(line)
