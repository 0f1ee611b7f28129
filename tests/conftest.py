"""Set-up that several folders share."""

from pathlib import Path

import pytest
from main_job import run_main_job


@pytest.fixture(scope="session")
def drawn_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's main job ran, on rows that are drawn."""
    return run_main_job(tmp_path_factory.mktemp("drawn"), drawn=True)
